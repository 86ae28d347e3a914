#!/bin/sh
# make_venv.sh PYTHON DIRECTORY: makes a virtual environment. On Debian and Ubuntu it first installs the packages that
# the environment and a C++ extension need, unless they are installed.
set -eu
python=$1 directory=$2

complete() {
  "$python" -c 'import ensurepip, venv, sysconfig, os, sys
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null &&
    command -v c++ >/dev/null
}

if ! complete; then
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  packages="python$version-venv python$version-dev g++"
  echo "Installing $packages"
  if [ "$(id -u)" = 0 ]; then sudo=; else sudo=sudo; fi
  $sudo apt-get update -q && $sudo apt-get install -y -q $packages
fi
"$python" -m venv "$directory"
