"""CPU seconds of a GRPO step: TRL's trainer alone against the stage's defaults, same data, seed and rewards.

python -m benchmarks.grpo_step              # results/grpo_step.csv
python -m benchmarks.grpo_step --phases     # results/grpo_phases.csv: where a step's time goes

Each contestant is the stage `train_grpo` on the default's training data, as a process, without validation but the first
and the last; a step lasts from one step's line in its log to the next. The larger policy is that of
`benchmarks.rollouts`, with 8 completions in a step. Phases are from Python's profiler, of one training each.
"""

import argparse
import itertools
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.made_up import write_sidecar
from benchmarks.measuring import replace_rows
from benchmarks.rollouts import SCALES, write_larger_policy
from workflow_scripts.configuration import Track, load
from workflow_scripts.policy.manifest import model_files
from workflow_scripts.provenance import ROOT, write_json
from workflow_scripts.stage_configuration import TrainGrpo

TRACKS: tuple[Track, ...] = ("imagereward", "hpsv2")
CONTESTANTS: dict[str, dict[str, Any]] = {
    "TRL": {"generation": "trl", "share_prompts": False},
    "engine's loop": {"share_prompts": False},
    "shared prompts": {"generation": "trl"},
    "both": {},
}
LARGER = {"prompts_per_step": 2, "group_size": 4}
STEPS = {"bundled": 5, "larger": 2}  # of a training, the first to warm up


class Case(NamedTuple):
    """What is trained with how many threads, and the folder of results with its data and its base policy."""

    folder: Path
    policy: str
    threads: int

    def data(self) -> dict[str, Any]:
        """Configuration of the default with few validation and test prompts."""
        sizes = {
            "imagereward": {"synthetic": {"validation_prompts": 4, "test_prompts": 4}},
            "hpsv2": {"synthetic": {"test_prompts": 4}},
        }
        used = {"validation_prompts": 1, "test_prompts": 4}
        steps, larger = STEPS[self.policy], self.policy == "larger"
        trained = {"steps": steps, "validate_every": steps, "warmup_steps": 0} | (LARGER if larger else {})
        return {
            "results": str(self.folder),
            "downloads": str(self.folder / "downloads"),
            "datasets": {name: own | used for name, own in sizes.items()},
            "training": {track: dict(trained) for track in TRACKS},
            "policy": {"max_pixels": SCALES["larger"][2]} if larger else {},
            "numeric_threads": self.threads,
        }

    def training(self, track: Track, choice: dict[str, Any], *profiler: str) -> list[float]:
        """CPU seconds of each step of a training but the first, run by Python with these `profiler` options.

        They are those of its process from one step's line in the log to the next.
        """
        raw = self.data()
        raw["training"][track] |= choice
        with tempfile.TemporaryDirectory() as temporary:
            out, inputs = Path(temporary), self.folder / "datasets" / track
            files = {"base": self.folder / f"policies/{self.policy}.json"}
            for split in ("train", "validation"):
                files |= {
                    split: inputs / split / "subset.parquet",
                    f"{split}_images": inputs / split / "images-0000.parquet",
                }
            files |= {"adapter": out / "adapter_model.safetensors", "adapter_config": out / "adapter_config.json"}
            files |= {"record": out / "training.json", "checkpoints": out / "checkpoints"}
            command = [sys.executable, "-u", *profiler, "-m", "workflow_scripts.train_grpo"]
            command += ["--config", TrainGrpo.of(load(raw), track, 0).canonical()]
            command += [word for name, path in files.items() for word in (f"--{name}", str(path))]
            untracked = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
            environment = untracked | {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
            quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
            with subprocess.Popen(command, cwd=ROOT, env=environment, **quiet) as process:  # type: ignore[call-overload]
                used = [psutil.Process(process.pid).cpu_times() for line in process.stdout if "'loss'" in line]
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        cpu = [times.user + times.system for times in used]
        assert len(cpu) == STEPS[self.policy], cpu
        return [after - before for before, after in itertools.pairwise(cpu)]


def phases(profile: Path) -> dict[str, float]:
    """Seconds of each phase of a profiled training's steps, by the names of TRL's and transformers' functions."""
    functions: Any = pstats.Stats(str(profile)).stats  # type: ignore[attr-defined]

    def spent(name: str, file: str = "grpo_trainer.py", within: str | None = None) -> float:
        """Seconds in functions of this name, those that they called included; only of calls from `within`."""
        total = 0.0
        for (path, _, own), (_, _, _, cumulative, callers) in functions.items():
            if own == name and path.endswith(file):
                from_it = (seconds for (_, _, caller), (_, _, _, seconds) in callers.items() if caller == within)
                total += sum(from_it) if within else cumulative
        return total

    scored = spent("_get_per_token_logps_and_entropies")
    in_loss = spent("wrapper", "extras/profiling.py", within="_compute_loss")
    around = spent("_generate_and_score_completions") - spent("_generate") - (scored - in_loss)
    trainer = "transformers/trainer.py"
    whole = spent("_run_epoch", trainer) - spent("_maybe_log_save_evaluate", trainer, within="_run_epoch")
    found = {
        "read and decode images": spent("get_batch_samples", trainer),
        "generate": spent("_generate"),
        "reference policy": scored - in_loss,
        "rewards, advantages, inputs": around,
        "forward": spent("compute_loss"),
        "backward": spent("backward", "accelerator.py"),
    }
    return found | {"optimizer and trainer": whole - sum(found.values())}


def main() -> None:
    """Make the data, measure, and write results/grpo_step.csv."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tracks", nargs="+", choices=TRACKS, default=list(TRACKS))
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--policy", choices=list(SCALES), default="bundled")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--phases", action="store_true", help="where a step's time goes, instead of its length")
    arguments = parser.parse_args()
    policy, threads = arguments.policy, arguments.threads
    contestants = {name: CONTESTANTS[name] for name in CONTESTANTS if name in {"TRL", *arguments.contestants}}
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        case = Case(folder := Path(temporary) / "results", policy, threads)
        configuration = Path(temporary) / "config.json"
        configuration.write_text(json.dumps(case.data()))
        splits = [f"{folder}/datasets/{t}/{s}/images-0000.parquet" for t in TRACKS for s in ("train", "validation")]
        command = [sys.executable, "-m", "snakemake", "--cores", "1", "--quiet", "all", "--nolock"]
        command += [*splits, "--configfile", str(configuration)]
        subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        weights = ROOT / load({}).policy.bundled
        if policy == "larger":
            write_larger_policy(weights := Path(temporary) / "larger")
        write_json(
            manifest := folder / f"policies/{policy}.json", {"path": str(weights), "files": model_files(weights)}
        )
        write_sidecar(manifest)
        if arguments.phases:
            profile = Path(temporary) / "profile"
            for track in arguments.tracks:
                seconds = {}
                for name, choice in contestants.items():
                    case.training(track, choice, "-m", "cProfile", "-o", str(profile))
                    seconds[name] = phases(profile)
                for phase in seconds["TRL"]:
                    row = {"policy": policy, "track": track, "threads": threads, "phase": phase}
                    for name, own in seconds.items():
                        row[f"{name}_seconds"] = f"{own[phase] / STEPS[policy]:.3f}"
                        row[f"{name}_percent"] = f"{100 * own[phase] / sum(own.values()):.1f}"
                    print(json.dumps(row), flush=True)
                    found.append(row)
            replace_rows("grpo_phases", ["policy", "track", "threads"], found)
            return
        for track in arguments.tracks:
            steps: dict[str, list[float]] = {name: [] for name in contestants}
            for number in range(arguments.rounds):
                for name in contestants if number % 2 == 0 else reversed(contestants):
                    steps[name].append(statistics.mean(case.training(track, contestants[name])))
                    print(json.dumps({name: own[-1:] for name, own in steps.items()}), flush=True)
            for name, own in steps.items():
                speedup = statistics.median(a / b for a, b in zip(steps["TRL"], own, strict=True))
                row = {"policy": policy, "track": track, "threads": threads, "contestant": name}
                row |= {"cpu_seconds_a_step": round(statistics.median(own), 3)}
                row |= {"speedup": round(speedup, 2), "rounds": arguments.rounds}
                print(json.dumps(row), flush=True)
                found.append(row)
            replace_rows("grpo_step", ["policy", "track", "threads"], found)


if __name__ == "__main__":
    main()
