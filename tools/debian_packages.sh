#!/usr/bin/env bash
# debian_packages.sh DIRECTORY SUITE COMPONENTS PACKAGE...: downloads packages of any Debian release into DIRECTORY/debs,
# without touching this machine's own lists. The mirror is this machine's if it has a Debian mirror.
set -euo pipefail
directory=$1 suite=$2 components=$3
shift 3
mkdir -p "$directory"/{lists/partial,archives/partial,debs}
uri=$(grep -hsoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d/* | head -1 || true)
keys=$(ls /usr/share/keyrings/debian-archive-keyring.* | head -1)
echo "deb [signed-by=$keys] ${uri:-http://deb.debian.org/debian} $suite $components" >"$directory/apt.list"
options=(-q -o "Dir::Etc::sourcelist=$directory/apt.list" -o Dir::Etc::sourceparts=- -o "Dir::State::Lists=$directory/lists"
  -o "Dir::Cache::archives=$directory/archives" -o Dir::State::status=/dev/null)
apt-get "${options[@]}" update
(cd "$directory/debs" && apt-get "${options[@]}" download "$@")
rm -rf "$directory/lists" "$directory/archives"
