#!/bin/sh
# Make or mend a virtual environment and install kvcycle and its tools into it: bootstrap.sh VENV CONSTRAINTS
set -eu

cd "$(dirname "$0")/.."
venv=$1 pins=$2
here=$(pwd -P)

usable() { # its python runs, is of a supported version and has pip, and the folder has not moved since
    version=$("$venv/bin/python" -c 'import pip, sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || return 1
    case $version in 3.12 | 3.13) ;; *) return 1 ;; esac
    [ "$(cat "$venv/.made-in" 2>/dev/null || echo "$here")" = "$here" ]
}

if ! usable; then
    if [ -e "$venv" ]; then
        echo "$venv does not work (any more) and is made anew."
        rm -rf "$venv" # before the search, which would find the old python in an activated environment
    fi
    python=$(scripts/find-python.sh)
    echo "Making $venv with $("$python" --version) ..."
    "$python" -m venv "$venv"
fi
echo "$here" >"$venv/.made-in"
if [ -e "$venv/.installed" ]; then
    echo "Updating $venv to $pins ..."
else
    echo "Installing $pins into $venv: about 2 GB on disk, usually 2 to 5 minutes, silent until it is done ..."
fi

start=$(date +%s)
"$venv/bin/python" -m pip --disable-pip-version-check -qq install --constraint "$pins" --editable '.[dev,plan]'
echo "Installed in $(($(date +%s) - start)) s."
