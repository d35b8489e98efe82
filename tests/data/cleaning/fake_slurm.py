"""Slurm's commands for a test: they run a job's script here, an array of two tasks at once, and keep what was asked for.

Called as `sbatch`, `squeue`, `srun` and `scontrol`; the folder FAKE_SLURM_SPOOL holds the jobs. With FAKE_SLURM_FAILS no
job does anything.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SPOOL = Path(os.environ["FAKE_SLURM_SPOOL"])


def sbatch(arguments):
    """Takes a job: its directives, its environment and its script."""
    job = len(list(SPOOL.glob("*.json"))) + 1
    script = Path(arguments[-1]).read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.MULTILINE))
    exported = dict(re.findall(r"(\w+)=(\w+)", next(value for value in arguments if value.startswith("--export=ALL,"))))
    (SPOOL / f"{job}.sh").write_text(script)
    (SPOOL / f"{job}.json").write_text(json.dumps(asked | {"exported": exported}))
    command = [sys.executable, __file__, "run_job", str(job)]
    done = subprocess.DEVNULL
    subprocess.Popen(command, stdin=done, stdout=done, stderr=done, start_new_session=True)
    print(f"Submitted batch job {job}")


def run_job(job):
    """Runs the tasks of a job's array, and says at last how they ended."""
    asked = json.loads((SPOOL / f"{job}.json").read_text())
    first, last, at_once = map(int, re.fullmatch(r"(\d+)-(\d+)%(\d+)", asked["array"]).groups())

    def run_task(task):
        names = {"SLURM_JOB_ID": job, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "here"}
        log = Path(asked["output"].replace("%A", job).replace("%a", str(task)))
        if "FAKE_SLURM_FAILS" in os.environ:
            return 1
        with log.open("w") as output:
            command = ["bash", SPOOL / f"{job}.sh"]
            environment = os.environ | asked["exported"] | names
            return subprocess.run(command, env=environment, stdout=output, stderr=output, check=False).returncode

    with ThreadPoolExecutor(at_once) as pool:
        codes = list(pool.map(run_task, range(first, last + 1)))
    (SPOOL / f"{job}.done").write_text(json.dumps(codes))


def squeue(arguments):
    """The jobs asked for that have not ended."""
    job = arguments[arguments.index("--jobs") + 1]
    if not (SPOOL / f"{job}.done").exists():
        print(job)


def srun(arguments):
    """The command after the options, of which datatrove gives -l and -n."""
    command = arguments[arguments.index("-n") + 2 :]
    os.execvp(command[0], command)


def scontrol(arguments):
    """The names of the machines of a list, which is one name here."""
    print(arguments[-1])


if __name__ == "__main__":
    if sys.argv[1] == "run_job":
        run_job(sys.argv[2])
    else:
        globals()[Path(sys.argv[0]).name](sys.argv[1:])
