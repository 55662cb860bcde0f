"""As `compiled`, of the kernels that choose tokens: `python -m tests.kernels.gpu.compiled_sampling`."""

import json
import sys
from dataclasses import asdict

import torch
import triton

from gptj_serve.kernels.gpu.sampling import DeviceSampler
from tests.kernels.gpu.compiled import CASES, CompilingDriver

WIDTH, NUM_TOKEN_IDS = 50400, 50257


def main() -> None:
    driver = CompilingDriver()
    triton.runtime.driver.set_active(driver)
    sampler = DeviceSampler()
    for driver.capability, dtype in dict.fromkeys(case[:2] for case in CASES):
        driver.dtype = str(dtype).removeprefix("torch.")
        for num_rows in (1, 7, 32):  # no kernel may be compiled for each
            logits = torch.zeros(num_rows, WIDTH, dtype=dtype)
            parameters = torch.zeros(sampler.num_fields, num_rows, dtype=torch.int64)
            for mode in sampler.modes:
                sampler.sample(logits, NUM_TOKEN_IDS, parameters, mode)
    json.dump([asdict(kernel) for kernel in driver.compiled], sys.stdout)


if __name__ == "__main__":
    main()
