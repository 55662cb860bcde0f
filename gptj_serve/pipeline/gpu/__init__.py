"""A stage on a GPU: `device` is what is needed of one, and `cuda_device` has it from torch; `step_buffers` bring a
microbatch there, and `gpu_stage` runs it, from graphs where it can."""
