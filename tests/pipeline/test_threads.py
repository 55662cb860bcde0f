import os
import subprocess
import sys

from gptj_serve.pipeline.threads import num_usable_cores, threads_per_stage


def test_cores_that_a_process_may_not_use_are_not_counted():
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{core}}}); from gptj_serve.pipeline import threads; "
    code += "import sys; print(threads.num_usable_cores(), threads.threads_per_stage(1), 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "1 1 False\n"


def test_stages_share_the_cores_unless_they_are_told():
    cores = num_usable_cores()
    assert threads_per_stage(1) == cores
    assert threads_per_stage(2) == max(1, cores // 2)
    assert threads_per_stage(cores + 1) == 1
    assert threads_per_stage(2, 7) == 7
