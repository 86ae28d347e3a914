#!/usr/bin/env bash
# forge_setup.sh: prepares the container in which cibuildwheel builds: CUDA 12.9 without its libraries, and the TensorFlows
# that the ops are built for.
set -euo pipefail
dnf install -y dnf-plugins-core
dnf config-manager --add-repo https://developer.download.nvidia.com/compute/cuda/repos/rhel8/x86_64/cuda-rhel8.repo
dnf install -y cuda-nvcc-12-9 cuda-cudart-devel-12-9
for minor in 2.20 2.21; do
  /opt/python/cp311-cp311/bin/python -m venv "/opt/tensorflow-$minor"
  "/opt/tensorflow-$minor/bin/pip" install --quiet "tensorflow==$minor.*"
done
