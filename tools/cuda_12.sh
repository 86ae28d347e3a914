#!/usr/bin/env bash
# cuda_12.sh DIRECTORY: puts the compiler, headers and static runtime of CUDA 12.4 into DIRECTORY, from Debian 13's packages
# of it. What is built with it runs with NVIDIA's drivers from 525 on. Needs a Debian or Ubuntu. Nothing is installed.
set -euo pipefail
directory=$(realpath -m "${1:?usage: cuda_12.sh DIRECTORY}")
tools/debian_packages.sh "$directory" trixie "main contrib non-free" nvidia-cuda-toolkit nvidia-cuda-dev libcudart12
root=$directory/root
mkdir -p "$root" "$directory"/{bin,lib64,nvvm/bin}
dpkg --fsys-tarfile "$directory"/debs/nvidia-cuda-toolkit_*.deb |
  tar -x -C "$root" --wildcards './usr/bin/*' './usr/lib/nvidia-cuda-toolkit/*'
dpkg --fsys-tarfile "$directory"/debs/nvidia-cuda-dev_*.deb |
  tar -x -C "$root" --wildcards './usr/include/*' '*/libcudart*' '*/libcudadevrt.a'
dpkg -x "$directory"/debs/libcudart12_*.deb "$root"  # CMake looks for it; nothing is linked with it
libraries=$root/usr/lib/x86_64-linux-gnu
mv "$root"/usr/bin/{bin2c,cudafe++,cuobjdump,fatbinary,nvlink,nvprune,ptxas} "$directory/bin"
mv "$root"/usr/lib/nvidia-cuda-toolkit/bin/{nvcc,crt} "$directory/bin"
mv "$root"/usr/lib/nvidia-cuda-toolkit/bin/cicc "$directory/nvvm/bin"
mv "$root"/usr/lib/nvidia-cuda-toolkit/libdevice "$directory/nvvm"
mv "$root"/usr/include "$directory/include"
mv "$libraries"/libcudart* "$libraries"/libcudadevrt.a "$directory/lib64"
rm -rf "$root" "$directory/debs"
cat >"$directory/bin/nvcc.profile" <<'PROFILE'
TOP = $(_HERE_)/..
CICC_PATH = $(TOP)/nvvm/bin
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(CICC_PATH):$(_HERE_):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES =+ $(_SPACE_) "-L$(TOP)/lib64"
PROFILE
"$directory/bin/nvcc" --version | tail -2
