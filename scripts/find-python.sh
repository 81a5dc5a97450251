#!/bin/sh
# Print the path of a Python that can run kvcycle: find-python.sh [VERSION...], by default 3.13 or 3.12.
#
# PYTHON, if set, is the only candidate. Otherwise: PATH, pyenv's installed versions (active or not), uv.
# A candidate counts only if it really runs: pyenv's shims exist for versions that are not active, and fail.
set -u

versions=${*:-3.13 3.12}
wanted=$(echo "$versions" | sed 's/ / or /g')

# Says "ok", or the predicate of a sentence about the interpreter. Runs on any Python, 2 included.
probe='
import sys
found = "%d.%d.%d" % tuple(sys.version_info[:3])
wanted = sys.argv[1:]
if "%d.%d" % tuple(sys.version_info[:2]) not in wanted:
    print("is Python %s, and kvcycle needs %s" % (found, " or ".join(wanted)))
    sys.exit()
import sysconfig
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    print("is the free-threaded build of Python %s, for which jaxlib has no release" % found)
    sys.exit()
try:
    import ctypes, ensurepip, ssl, venv
except ImportError as error:
    print("is Python %s without a part that kvcycle needs (%s)" % (found, error))
    sys.exit()
print("ok")
'

# The unquoted $versions is a list.
judge() { # shellcheck disable=SC2086
    "$1" -c "$probe" $versions 2>/dev/null </dev/null
}

offer() { # print $1 and stop, if it works
    if [ -n "$1" ] && [ "$(judge "$1")" = ok ]; then
        printf '%s\n' "$1"
        exit 0
    fi
}

fail() {
    printf '%s\n' "$1" >&2
    exit 1
}

if [ -n "${PYTHON:-}" ]; then
    path=$(command -v "$PYTHON") || fail "PYTHON=$PYTHON is no command; give the path of a Python $wanted, or leave PYTHON unset."
    verdict=$(judge "$path")
    [ "$verdict" = ok ] || fail "PYTHON=$PYTHON ${verdict:-does not run}; give another, or leave PYTHON unset."
    printf '%s\n' "$path"
    exit 0
fi

for name in $(printf 'python%s ' $versions) python3 python; do
    offer "$(command -v "$name")"
done

for version in $versions; do
    for path in "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$version".*/bin/python3; do
        offer "$path"
    done
done

if command -v uv >/dev/null; then
    for version in $versions; do
        offer "$(uv python find --system "$version" 2>/dev/null)"
    done
    first=${versions%% *}
    echo "No Python $wanted is installed; uv installs Python $first (about 35 MB) ..." >&2
    uv python install "$first" >&2 && offer "$(uv python find --system "$first")"
fi

fail "No working Python $wanted was found on PATH, in pyenv or through uv: install one (pyenv install ${versions%% *}, \
uv python install ${versions%% *}, or apt-get install python3.12-venv where the system has it), or name one with PYTHON=/path/to/python."
