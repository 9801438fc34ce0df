"""How fair is the base policy? Its valid share on every stream world, and how diverse it and real texts are.

    python benchmarks/base_policy.py --seed=1

Trains the base policy of configs/quickstart.py (or takes it from the cache) and writes
benchmarks/results/base_policy.json.
"""

import argparse
import json
import pathlib

from streamsynth import assemble, config, pretrain
from streamsynth import weights as weights_lib
from streamsynth.evaluation import diversity, measure
from streamsynth.stream.markers import MarkerFormat
from streamsynth.tasks.worlds import STREAM_WORLDS

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "base_policy.json"
METRICS = ("vendi", "distinct_2")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    seed = parser.parse_args().seed
    names = ",".join(f"worlds:{name}" for name in STREAM_WORLDS)
    run = config.load(str(ROOT / "configs" / f"quickstart.py:seed={seed}"), {"stream.tasks": names})
    tasks = assemble.load_tasks(run)
    policy = pretrain.base_policy(run, tasks, cache_dir=weights_lib.cache_directory(run))
    form = MarkerFormat(policy.tokenizer, run.rollout.prompt_length, run.rollout.completion_length)
    found = {}
    for task in tasks:
        drawn = measure.draw(
            policy.model, policy.variables, form, task, run, seed=seed, place=lambda tree: tree
        )
        count = run.evaluation.diversity_texts
        real = diversity.measure([example.text for example in task.train], count, seed)
        own = diversity.measure(drawn.texts, count, seed)
        found[task.name] = {
            "valid": float(measure.verify(task, drawn.texts, drawn.label).mean()),
            **{f"{metric}_real_over_base": real[metric] / own[metric] for metric in METRICS},
        }
        print(task.name, found[task.name], flush=True)
    command = f"python benchmarks/base_policy.py --seed={seed}"
    RESULTS.write_text(json.dumps({"command": command, "worlds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
