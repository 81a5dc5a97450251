#!/bin/sh
# The part of `kvcycle vm` that runs on the VM: remote.sh COMMAND [ARGUMENT...]
#
# gcloud repeats a command whose connection broke, so each one may be run twice and must then do no harm. What a program
# reads goes to standard output; what a person reads goes to standard error. No command exits with 255: to gcloud that
# is a broken connection. The exit code of the suite therefore travels as a line of text.
set -eu
umask 077

base=$HOME/kvcycle-vm
checkout=$base/checkout
lock=$base/lock # held by the run itself, as an open file that its processes inherit: it cannot outlive them
BUSY=75 NO_RUN=66 BAD_DATA=65 NO_ENVIRONMENT=69

say() { printf '%s\n' "$*" >&2; }
refuse() { # CODE SENTENCE
    code=$1
    shift
    say "$*"
    exit "$code"
}
locked() { ! flock -n "$lock" true; }

# --- the code ---------------------------------------------------------------------------------------------------------

bring() { # REVISION: make the checkout exactly this commit, from the bundle that has arrived
    bundle=$base/incoming/$1.bundle
    command -v git >/dev/null || refuse $NO_ENVIRONMENT "There is no git on this machine: install it (apt-get install git)."
    ! locked || refuse $BUSY "A run lives here, and the code is not changed under it."
    if [ -f "$bundle" ]; then
        [ -d "$checkout/.git" ] || git init -q "$checkout"
        cd "$checkout"
        name=$(git bundle list-heads "$bundle" | sed -n "s/^$1 //p" | head -n 1)
        [ -n "$name" ] || refuse $BAD_DATA "The bundle that arrived does not hold commit $1."
        git fetch -q "$bundle" "$name"
        git checkout -q --force --detach "$1"
        git clean -ffdq
        rm -f "$bundle"
    fi
    cd "$checkout"
    here=$(git rev-parse HEAD)
    [ "$here" = "$1" ] || refuse $BAD_DATA "The checkout is at $here and not at $1."
    [ -z "$(git status --porcelain)" ] || refuse $BAD_DATA "The checkout differs from its commit: $(git status --porcelain | head -n 3)"
    echo "revision $here"
}

# --- the environment --------------------------------------------------------------------------------------------------

find_conda() {
    for candidate in "$(command -v conda || true)" "${CONDA_EXE:-}" "$HOME"/miniconda3/bin/conda "$HOME"/miniforge3/bin/conda \
        "$HOME"/anaconda3/bin/conda /opt/conda/bin/conda /opt/miniconda3/bin/conda; do
        if [ -n "$candidate" ] && [ -x "$candidate" ]; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    refuse $NO_ENVIRONMENT "No conda was found: not on PATH, and not in miniconda3, miniforge3 or anaconda3 at home, nor in /opt." \
        "Leave --conda-env away to have a virtual environment made."
}

environment_python() { # STACK CONDA_ENV|-: print the environment's python, which may not be there yet
    if [ "$2" = - ]; then
        printf '%s\n' "$base/venvs/$1/bin/python"
        return
    fi
    conda=$(find_conda)
    "$conda" run -n "$2" python -c 'import sys; print(sys.executable)' 2>/dev/null | tail -n 1 | grep . ||
        refuse $NO_ENVIRONMENT "There is no conda environment $2 with a python here. There are: $("$conda" env list |
            sed -n 's/^\([^# ][^ ]*\) .*/\1/p' | tr '\n' ' ')"
}

prepare() { # STACK CONDA_ENV|-: an environment made of the stack's constraints; one that is already is kept as it is
    exec 8>>"$base/prepare.lock"
    flock 8 # a repeated command waits for the one whose connection broke, and then finds its work done
    cd "$checkout"
    pins=constraints/$1.txt
    [ -f "$pins" ] || refuse $BAD_DATA "There is no $pins in the checkout."
    python=$(environment_python "$1" "$2")
    if [ "$2" = - ] && ! "$python" -c 'import pip' 2>/dev/null; then
        rm -rf "$base/venvs/$1"
        system=$(scripts/find-python.sh) || exit $NO_ENVIRONMENT
        "$system" -m venv "$base/venvs/$1"
        echo "progress a new virtual environment with $("$python" --version)"
    fi
    "$python" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' ||
        refuse $NO_ENVIRONMENT "The environment has $("$python" --version), and kvcycle needs 3.12 or 3.13."
    "$python" - >"$base/requirements.txt" <<'PYTHON'
import tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], *project["optional-dependencies"]["tpu"], sep="\n")
PYTHON
    pip() { "$python" -m pip --disable-pip-version-check --no-input install -c "$pins" -r "$base/requirements.txt" "$@" 8>&-; }
    # Without an index pip can only be content if everything is there, in the versions of the constraints.
    if pip -q --dry-run --no-index >/dev/null 2>&1; then
        echo "environment kept $python"
        return
    fi
    echo "progress installing $pins, about 2 GB, usually 2 to 5 minutes"
    pip --progress-bar off | sed -u -n 's/^\(Collecting\|Installing\|Successfully\)/progress \1/p' # judged by the next line
    pip -q --dry-run --no-index >/dev/null 2>&1 ||
        refuse $NO_ENVIRONMENT "pip did not make the environment $python what $pins says (see above)."
    echo "environment made $python"
}

# --- the run ----------------------------------------------------------------------------------------------------------

start() { # RUN IDENTITY STACK CONDA_ENV|- WORKER WORKERS HOST_0:PORT|- TOKEN_FILE|- PYTEST_ARGUMENT...
    run=$base/runs/$1
    if [ -d "$run" ] && [ -f "$run/identity" ]; then
        echo "started $1"
        return
    fi
    exec 9>>"$lock"
    flock -n 9 || refuse $BUSY "Another run lives here: $(cat "$base/current")."
    mkdir -p "$run/reports"
    [ "$8" = - ] || mv "$HOME/$8" "$run/hf-token"
    printf '%s\n' "$1" >"$base/current"
    printf '%s\n' "$2" >"$run/identity.new"
    nohup setsid sh "$0" supervise "$@" >>"$run/$1.log" 2>&1 </dev/null &
    # It notes its process once it has a session of its own: until then the end of this connection could take it along.
    tries=0
    while [ ! -s "$run/pid" ]; do
        tries=$((tries + 1))
        [ $tries -le 600 ] || refuse 1 "The suite did not start within half a minute: $(tail -n 3 "$run/$1.log")"
        sleep 0.05
    done
    mv "$run/identity.new" "$run/identity"
    echo "started $1"
}

supervise() { # the same arguments: run the suite to its end and note its exit code
    run=$base/runs/$1 worker=$5 workers=$6 meeting=$7
    echo $$ >"$run/pid"
    if [ -f "$run/hf-token" ]; then
        HF_TOKEN=$(cat "$run/hf-token")
        export HF_TOKEN
        rm -f "$run/hf-token"
    fi
    python=$(environment_python "$3" "$4")
    shift 8
    cd "$checkout"
    export PYTHONPATH="$checkout/src" PYTHONUNBUFFERED=1
    if [ "$meeting" != - ]; then # the hosts are one run
        export KVCYCLE_RANK="$worker" KVCYCLE_HOSTS="$workers" KVCYCLE_COORDINATOR="$meeting"
    fi
    PATH=$(dirname "$python"):$PATH
    "$python" scripts/guard.py "$python" -m pytest "$@" &
    child=$!
    trap 'kill -TERM $child 2>/dev/null' TERM INT # the suite then ends with its reports
    code=0
    wait $child || code=$?
    while kill -0 $child 2>/dev/null; do # the wait was interrupted by the signal
        code=0
        wait $child || code=$?
    done
    echo "$code" >"$run/exit-code.new"
    mv "$run/exit-code.new" "$run/exit-code"
}

state() { # RUN: running, ended CODE, or lost
    run=$base/runs/$1
    [ -d "$run" ] || refuse $NO_RUN "There is no run $1 here."
    if [ ! -f "$run/exit-code" ] && [ "$(cat "$base/current")" = "$1" ] && locked; then
        echo running
    elif [ -f "$run/exit-code" ]; then # looked at again: it is written before the lock is let go
        echo "ended $(cat "$run/exit-code")"
    else
        echo lost
    fi
}

status() { # what the newest run is and how it stands
    [ -f "$base/current" ] || {
        echo "state none"
        return
    }
    id=$(cat "$base/current")
    echo "run $id"
    echo "identity $(cat "$base/runs/$id/identity" 2>/dev/null || true)"
    echo "state $(state "$id")"
    [ ! -f "$base/runs/$id/collected" ] || echo "collected yes"
}

follow() { # RUN OFFSET: the log from that byte on, in lines that each say where their bytes belong, and then the end
    run=$base/runs/$1 offset=$2 quiet=0
    echo # a repeated command's first line must not join one that was cut off
    while :; do
        now=$(state "$1") # before the size, so that nothing written until the end is left out
        size=$(stat -c %s "$run/$1.log" 2>/dev/null || echo 0)
        while [ "$offset" -lt "$size" ]; do
            length=$((size - offset))
            [ "$length" -le 24576 ] || length=24576
            printf 'kvcycle-log %s %s ' "$offset" "$length"
            tail -c +$((offset + 1)) "$run/$1.log" | head -c "$length" | base64 -w 0
            echo
            offset=$((offset + length)) quiet=0
        done
        if [ "$now" != running ]; then
            echo "kvcycle-end $size $now"
            return
        fi
        quiet=$((quiet + 1))
        [ $((quiet % 50)) -ne 0 ] || echo kvcycle-alive # finds out whether anybody still listens
        sleep 0.2
    done
}

reports() { # RUN: whether the suite left reports
    if [ -d "$base/runs/$1/reports/latest" ]; then echo "reports yes"; else echo "reports no"; fi
}

collected() { # RUN: its log and reports have arrived
    : >"$base/runs/$1/collected"
}

stop() { # term|kill: end the run that lives; with TERM the suite writes its reports
    [ -f "$base/current" ] || {
        echo "stopped none"
        return
    }
    id=$(cat "$base/current")
    if [ "$(state "$id")" != running ]; then
        echo "stopped none"
        return
    fi
    pid=$(cat "$base/runs/$id/pid")
    if [ "$1" = kill ]; then kill -s KILL -- "-$pid"; else kill -TERM "$pid"; fi
    if flock -w 60 "$lock" true; then echo "stopped $id"; else echo "living $id"; fi
}

command=$1
shift
case $command in
bring | prepare | start | supervise | status | follow | reports | collected | stop) "$command" "$@" ;;
*) refuse 64 "remote.sh has no command $command." ;;
esac
