"""Kernels for GPUs: `rows` describes a microbatch to them."""
