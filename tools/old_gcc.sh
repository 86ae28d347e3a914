#!/usr/bin/env bash
# old_gcc.sh DIRECTORY: makes DIRECTORY/g++, which compiles with this machine's g++ for systems as old as Debian 11: glibc
# 2.31 and libstdc++ 10, whose headers and libraries it downloads. What is built then loads on older systems than this one.
# Needs a Debian or Ubuntu with g++. Nothing is installed.
set -euo pipefail
directory=$(realpath -m "${1:?usage: old_gcc.sh DIRECTORY}")
tools/debian_packages.sh "$directory" bullseye main libc6 libc6-dev libcrypt1 libcrypt-dev libgcc-10-dev libgcc-s1 \
  libstdc++6 libstdc++-10-dev linux-libc-dev
root=$directory/root
for package in "$directory"/debs/*.deb; do dpkg -x "$package" "$root"; done
# Absolute links point out of the directory.
find "$root" -lname '/*' | while read -r link; do ln -sf "$root$(readlink "$link")" "$link"; done
# Without -lpthread a weak symbol would come in by the version that this machine's own library has. GCC 12 warns of
# moves within libstdc++ 10's own std::function.
cat >"$directory/g++" <<SCRIPT
#!/bin/sh
exec g++ --sysroot="$root" -nostdinc++ -isystem "$root/usr/include/c++/10" \\
  -isystem "$root/usr/include/x86_64-linux-gnu/c++/10" -isystem "$root/usr/include/c++/10/backward" \\
  -B "$root/usr/lib/x86_64-linux-gnu" \\
  -L "$root/usr/lib/gcc/x86_64-linux-gnu/10" -L "$root/usr/lib/x86_64-linux-gnu" -L "$root/lib/x86_64-linux-gnu" \\
  "\$@" -Wno-uninitialized -Wno-maybe-uninitialized -lpthread
SCRIPT
chmod +x "$directory/g++"
