"""What every pod config takes on its slice of TPUs, and others on a host of GPUs, by compiling without them.

python benchmarks/compile.py [--pods=gemma2_2b@v5e:4x4,...] [--only=update,...]

Writes a report for each pod or host under benchmarks/results/compile/, program by program: what is there
already for the same config and versions is not compiled again; after a change of the programs, remove it
first. Needs libtpu (the extra `tpu`) and JAX's CUDA plugin (see the README); a program takes minutes.
"""

import argparse
import json
import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compile"
PODS = (
    "gemma2_2b@v5e:4x4",
    "qwen3_4b@v6e:4x4",
    "llama31_8b@v5p:4x4x4",
    "gemma2_9b@v5p:4x4x4",
    "gemma2_9b@v5e:16x16",
    "gemma2_27b@v5p:4x4x4",
)
EACH = "rollout_gathering_at_every_token"
# One host of GPUs, with an adapter.
HOSTS = ("gemma2_2b@h100:8", "qwen3_4b@h100:8", "qwen25_7b@h100:8", "llama31_8b@h100:8", "gemma2_9b@h100:8")


def compile_pod(name: str, topology: str, only: list[str]) -> None:
    """Completes the report of one pod or host, by the programs of `only` or all."""
    from streamsynth import config as config_lib
    from streamsynth.compile import compile_run, program_names, versions
    from streamsynth.costs.chips import GPUS, parse_topology
    from streamsynth.runtime.files import atomic_write

    where = parse_topology(topology)
    flag = f"configs/{name}.py" + ("" if where.kind in GPUS else f":pod={topology}")
    config = config_lib.load(str(ROOT / flag))
    digest = config_lib.content_hash(config)
    path = RESULTS / f"{name}_{topology.replace(':', '_')}.json"
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    names = program_names(config, topology)

    def known() -> dict:
        """What is there, also by others that compile programs of this pod meanwhile."""
        found = json.loads(path.read_text()) if path.exists() else {}
        same = (found.get("config_hash"), found.get("versions")) == (digest, versions(where))
        return found if same else {}

    def save(report: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(report, indent=1) + "\n")

    for program in names:
        if program in [one["name"] for one in known().get("programs", [])] or (only and program not in only):
            continue
        found = compile_run(config, topology, flag, (program,))
        # Later programs may be of a later commit.
        new = [{**one, "commit": commit} for one in found["programs"]]
        before = known()
        others = [one for one in before.get("programs", []) if one["name"] != program]
        report = {
            **before,
            "command": f"streamsynth compile --config={flag} --topology={topology} --json",
            "config_hash": digest,
            **found,
            "declared": names,
            "programs": sorted(others + new, key=lambda one: names.index(one["name"])),
            "fits": all(one["fits"] for one in others + new),
            "advice": list(dict.fromkeys(before.get("advice", []) + found["advice"])),
        }
        save(report)
        print(f"{path.name}: {program}, {'fits' if found['fits'] else 'does not fit'}", flush=True)

    # What it is worth to gather parameters once a rollout.
    if config.policy.gather_to_sample and EACH not in known() and (not only or EACH in only):
        each = config_lib.load(str(ROOT / flag), {"policy.gather_to_sample": "False"})
        [rollout] = compile_run(each, topology, flag, ("rollout",))["programs"]
        save({**known(), EACH: {**rollout, "commit": commit}})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pods", default=",".join(PODS + HOSTS))
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    only = list(filter(None, arguments.only.split(",")))
    # Before JAX is imported, as the command does it.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    for pod in arguments.pods.split(","):
        compile_pod(*pod.split("@"), only)


if __name__ == "__main__":
    main()
