"""Kernels for GPUs, in Triton: `layers` runs a stage's layers on `attention`, `inward`, `norm` and the products of
`weights`; `rows` describes a microbatch to them, `tiles` has sizes, `availability` says whether they can be used."""
