"""Compare CPU seconds of a GRPO step: the plain TRL trainer and this project's loop and passes, on sampled answers.

python -m benchmarks.grpo_step              # results/grpo_step.csv
python -m benchmarks.grpo_step --phases     # results/grpo_phases.csv: time by phase of a step

Each contestant runs the stage `train_grpo` on the default training data in its own process, with the first and the last
validation only. A step lasts from its line in the log to the next. The larger policy is that of `benchmarks.rollouts`,
with 8 completions per step. The Python profiler gives the phases, from one training each.
"""

import argparse
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.made_up import write_sidecar
from benchmarks.measuring import ROUNDS, Cost, in_turn, replace_rows, summarised
from benchmarks.rollouts import SCALES, write_larger_policy
from workflow_scripts.configuration.model import Track, load
from workflow_scripts.configuration.stages import TrainGrpo
from workflow_scripts.files.paths import ROOT
from workflow_scripts.files.writing import write_json
from workflow_scripts.policy.manifest import model_files

TRACKS: tuple[Track, ...] = ("imagereward", "hpsv2")
CONTESTANTS: dict[str, dict[str, Any]] = {
    "TRL": {"generation": "trl", "share_prompts": False},
    "engine's loop": {"share_prompts": False},
    "shared prompts": {"generation": "trl"},
    "both": {},
}
BUNDLED, LARGER = {"prompts_per_step": 32, "group_size": 4}, {"prompts_per_step": 2, "group_size": 4}
STEPS = {"bundled": 5, "larger": 2}  # per training; the first warms up


class Case(NamedTuple):
    """Policy and threads of a training, and the results folder with its data and base policy."""

    folder: Path
    policy: str
    threads: int

    def data(self) -> dict[str, Any]:
        """Return the default configuration with few validation and test prompts."""
        sizes = {
            "imagereward": {"synthetic": {"validation_prompts": 4, "test_prompts": 4}},
            "hpsv2": {"synthetic": {"test_prompts": 4}},
        }
        used = {"validation_prompts": 1, "test_prompts": 4}
        steps, larger = STEPS[self.policy], self.policy == "larger"
        trained = {"steps": steps, "validate_every": steps, "warmup_steps": 0} | (LARGER if larger else BUNDLED)
        trained |= {"reward_signal": "sampled"}  # TRL's loop generates for no other
        return {
            "results": str(self.folder),
            "downloads": str(self.folder / "downloads"),
            "datasets": {name: own | used for name, own in sizes.items()},
            "training": {track: dict(trained) for track in TRACKS},
            "policy": {"max_pixels": SCALES["larger"][2]} if larger else {},
            "numeric_threads": self.threads,
        }

    def training(self, track: Track, choice: dict[str, Any], *profiler: str) -> Cost:
        """Return the mean cost of a step after the first, for a training under Python with these `profiler` options.

        It is the cost of the process between the log lines of the first and the last step.
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
            command = [sys.executable, "-u", *profiler, "-m", "workflow_scripts.stages.train_grpo"]
            command += ["--config", TrainGrpo.of(load(raw), track, 0).canonical()]
            command += [word for name, path in files.items() for word in (f"--{name}", str(path))]
            untracked = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
            environment = untracked | {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
            quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
            with subprocess.Popen(command, cwd=ROOT, env=environment, **quiet) as process:  # type: ignore[call-overload]
                lines = (line for line in process.stdout if "'loss'" in line)
                used = [(time.perf_counter(), psutil.Process(process.pid).cpu_times()) for _ in lines]
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        assert len(used) == STEPS[self.policy], used
        (begun, before), (ended, after) = used[0], used[-1]
        cpu = after.user + after.system - before.user - before.system
        return Cost((ended - begun) / (len(used) - 1), cpu / (len(used) - 1))


def phases(profile: Path) -> dict[str, float]:
    """Return the seconds of each phase of profiled steps, by the names of functions in TRL and transformers."""
    functions: Any = pstats.Stats(str(profile)).stats  # type: ignore[attr-defined]

    def spent(name: str, file: str = "grpo_trainer.py", within: str | None = None) -> float:
        """Return cumulative seconds of functions with this name, only for calls from `within`."""
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


def lengths(case: Case, track: Track, contestants: dict[str, dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """Measure the step of each contestant, in alternating order; return one row each."""
    steps: dict[str, list[Cost]] = {name: [] for name in contestants}
    for name in in_turn(contestants, rounds):
        steps[name].append(case.training(track, contestants[name]))
        print(case.policy, track, case.threads, name, steps[name][-1], flush=True)
    return [{"policy": case.policy, "track": track, "threads": case.threads, **row} for row in summarised(steps)]


def shares(case: Case, track: Track, contestants: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each phase: seconds and per cent of a step for each contestant."""
    seconds = {}
    with tempfile.TemporaryDirectory() as temporary:
        profile = Path(temporary) / "profile"
        for name, choice in contestants.items():
            case.training(track, choice, "-m", "cProfile", "-o", str(profile))
            seconds[name] = phases(profile)
    rows = []
    for phase in seconds["TRL"]:
        row = {"policy": case.policy, "track": track, "threads": case.threads, "phase": phase}
        for name, own in seconds.items():
            row[f"{name}_seconds"] = f"{own[phase] / STEPS[case.policy]:.3f}"
            row[f"{name}_percent"] = f"{100 * own[phase] / sum(own.values()):.1f}"
        rows.append(row)
    return rows


def main() -> None:
    """Make the data, measure, and write results/grpo_step.csv (with --phases: results/grpo_phases.csv)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--policies", nargs="+", choices=list(SCALES), default=list(SCALES))
    parser.add_argument("--tracks", nargs="+", choices=TRACKS, default=list(TRACKS))
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1 2, with --phases 1")
    parser.add_argument(
        "--contestants", nargs="+", choices=list(CONTESTANTS), default=["both"], help="compared with TRL"
    )
    parser.add_argument("--phases", action="store_true", help="measure the time by phase instead of the step")
    arguments = parser.parse_args()
    contestants = {name: CONTESTANTS[name] for name in CONTESTANTS if name in {"TRL", *arguments.contestants}}
    with tempfile.TemporaryDirectory() as temporary:
        folder, configuration = Path(temporary) / "results", Path(temporary) / "config.json"
        configuration.write_text(json.dumps(Case(folder, "bundled", 1).data()))
        splits = [f"{folder}/datasets/{t}/{s}/images-0000.parquet" for t in TRACKS for s in ("train", "validation")]
        command = [sys.executable, "-m", "snakemake", "--cores", "1", "--quiet", "all", "--nolock"]
        command += [*splits, "--configfile", str(configuration)]
        subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        for policy in arguments.policies:
            weights = ROOT / load({}).policy.bundled
            if policy == "larger":
                write_larger_policy(weights := Path(temporary) / "larger")
            manifest = folder / f"policies/{policy}.json"
            write_json(manifest, {"path": str(weights), "files": model_files(weights)})
            write_sidecar(manifest)
            for threads in arguments.threads or ([1] if arguments.phases else [1, 2]):
                case = Case(folder, policy, threads)
                for track in arguments.tracks:
                    rows = (
                        shares(case, track, contestants)
                        if arguments.phases
                        else lengths(case, track, contestants, arguments.rounds)
                    )
                    for row in rows:
                        print(json.dumps(row), flush=True)
                    name = "grpo_phases" if arguments.phases else "grpo_step"
                    replace_rows(name, ["policy", "track", "threads"], rows)


if __name__ == "__main__":
    main()
