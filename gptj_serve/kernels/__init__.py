"""Our own kernels: `cpu_library` compiles those for CPUs, `weights` packs what they multiply with, `cpu_layers` runs
a stage's layers on them. Those for GPUs are in `gpu`."""
