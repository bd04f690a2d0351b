"""Write the results of all jobs as results.json, as a Markdown table and as a bar chart."""

import statistics
from pathlib import Path
from typing import Any

from megabert.finetune.base_model import BaseModel
from megabert.finetune.jobs.job import PRETRAINED, RANDOM_INIT, TFIDF, FinetuneJob
from megabert.finetune.protocol import MNLI, Protocol
from megabert.finetune.record import read_record, write_record
from megabert.finetune.tasks.task import EIGHT, Task
from megabert.plots.score_bars import Bar, plot_score_bars

# Version of results.json.
FORMAT_VERSION = 2
TITLES = {
    PRETRAINED: "fine-tuned, pretrained",
    RANDOM_INIT: "fine-tuned, from random weights",
    TFIDF: "TF-IDF + linear model",
}


def summarize(jobs: list[FinetuneJob], results: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return task -> contender -> mean, std (of the sample; None for one seed), n, planned, metrics, scores, failed.

    Of a sweep, the candidate with the best mean counts. Jobs that failed or did not run yet are left out of the mean,
    and listed.
    """
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for task in dict.fromkeys(job.task.name for job in jobs):
        for contender in TITLES:
            chosen = [job for job in jobs if job.task.name == task and job.contender == contender]
            if chosen:
                summary.setdefault(task, {})[contender] = _summarize_one(chosen, results)
    return summary


def _summarize_one(jobs: list[FinetuneJob], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    candidates = {
        candidate: [job for job in jobs if job.candidate == candidate]
        for candidate in dict.fromkeys(job.candidate for job in jobs)
    }
    done = {
        candidate: [results[job.name] for job in group if results.get(job.name, {}).get("status") == "done"]
        for candidate, group in candidates.items()
    }
    failed = {
        job.name: result["error"] for job in jobs if (result := results.get(job.name)) and result["status"] == "failed"
    }
    missing = [job.name for job in jobs if job.name not in results]
    finished = {candidate: group for candidate, group in done.items() if group}
    outcome: dict[str, Any] = {"mean": None, "std": None, "n": 0, "scores": [], "metrics": {}, "seconds": 0.0}
    best = next(iter(candidates))
    if finished:
        best = max(finished, key=lambda candidate: statistics.mean(result["score"] for result in finished[candidate]))
        scores = [result["score"] for result in finished[best]]
        outcome = {
            "mean": statistics.mean(scores),
            "std": statistics.stdev(scores) if len(scores) > 1 else None,
            "n": len(scores),
            "scores": scores,
            "metrics": {
                name: statistics.mean(result["scores"][name] for result in finished[best])
                for name in finished[best][0]["scores"]
            },
            "seconds": sum(result["seconds"] for group in finished.values() for result in group),
            "train_examples": finished[best][0]["train_examples"],
            "dev_examples": finished[best][0]["dev_examples"],
        }
    job = candidates[best][0]
    outcome |= {
        "planned": len(candidates[best]),
        "candidates": len(candidates),
        "settings": job.settings.__dict__,
        "counting": job.score_metrics,
        "start": MNLI if job.from_mnli else "checkpoint",
        "failed": failed,
        "missing": missing,
    }
    return outcome


def average(summary: dict[str, dict[str, dict[str, Any]]]) -> tuple[float | None, str]:
    """Return the unweighted mean over GLUE's eight tasks, or over those that ran, and a title for it.

    The mean is None if a job failed or did not run.
    """
    counted = [task for task in summary if task != "wnli"]
    parts = [summary[task][PRETRAINED] for task in counted]
    title = "mean of GLUE's eight" if sorted(counted) == sorted(EIGHT) else f"mean of {', '.join(counted)} only"
    if not parts:
        return None, "mean of nothing"
    if any(part["failed"] or part["missing"] or part["mean"] is None for part in parts):
        return None, f"{title}: withheld, because jobs are missing"
    return statistics.mean(part["mean"] for part in parts), title


def as_results(
    checkpoint: str, base: BaseModel, protocol: Protocol, without_mnli: list[str], summary: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of results.json."""
    mean, title = average(summary)
    return {
        "checkpoint": checkpoint,
        "checkpoint_sha256": base.sha256,
        "protocol": protocol.name,
        "protocol_about": protocol.about,
        "without_mnli_start": without_mnli,
        "average": mean,
        "average_of": title,
        "tasks": summary,
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    write_record(path, results, FORMAT_VERSION)


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json. Raises ValueError if it is missing, damaged, changed by hand or of another version."""
    try:
        return read_record(path, FORMAT_VERSION)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file. Run the fine-tuning first.") from error
    except ValueError as error:
        raise ValueError(f"{error} Run the fine-tuning again: it reuses its jobs and writes the file anew.") from error


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def as_markdown(results: dict[str, Any], tasks: list[Task]) -> str:
    """Return the table, with scores times 100, as papers print them."""
    metrics = {task.name: task.metrics for task in tasks}
    lines = [
        f"Protocol: {results['protocol']}. {results['protocol_about']}",
        f"Checkpoint: {results['checkpoint']} (sha256 {results['checkpoint_sha256'][:16]})",
        "",
        "| task | model | score | std | n | metrics | start | examples | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for task, contenders in results["tasks"].items():
        for contender, part in contenders.items():
            each = ", ".join(f"{name} {_percent(value)}" for name, value in part["metrics"].items())
            count = f"{part['n']}" if part["n"] == part["planned"] else f"{part['n']} of {part['planned']}"
            lines.append(
                f"| {task} | {TITLES[contender]} | {_percent(part['mean'])} | {_percent(part['std'])} | {count} "
                f"| {each or ', '.join(metrics[task])} | {'' if contender == TFIDF else part['start']} "
                f"| {part.get('train_examples', 0):,} / {part.get('dev_examples', 0):,} | {part['seconds']:.0f} |"
            )
            notes += [f"- FAILED: {name}: {error}" for name, error in part["failed"].items()]
            notes += [f"- not run yet: {name}" for name in part["missing"]]
            if part["candidates"] > 1:
                notes.append(f"- {task}: the best of {part['candidates']} candidates, chosen by this same score")
            if part["counting"]:
                notes.append(f"- {task}, {TITLES[contender]}: the score is only {' and '.join(part['counting'])}")
    notes += [
        f"- {task.name}: scored on the file that it was trained on" for task in tasks if task.scores_training_file
    ]
    lines.append(
        f"| **average** | {TITLES[PRETRAINED]} | {_percent(results['average'])} | | | {results['average_of']} | | | |"
    )
    if results["without_mnli_start"]:
        named = ", ".join(results["without_mnli_start"])
        notes.append(
            f"- NOT the protocol: {named} started from the checkpoint, not from MNLI's encoder (--allow-no-mnli)"
        )
    lines += ["", "Scores are times 100; std is over seeds; examples: training / scored.", *notes]
    return "\n".join(lines) + "\n"


def plot_scores(results: dict[str, Any], out: Path) -> None:
    """Draw a bar for each task and contender, with the standard deviation over seeds."""
    tasks = results["tasks"]
    bars = [
        Bar(task, TITLES[contender], 100 * part["mean"], None if part["std"] is None else 100 * part["std"])
        for contender in TITLES
        for task, parts in tasks.items()
        if (part := parts.get(contender)) and part["mean"] is not None
    ]
    titles = [title for name, title in TITLES.items() if any(name in parts for parts in tasks.values())]
    mean = results["average"]
    heading = results["protocol"] + ("" if mean is None else f": average {100 * mean:.2f}")
    plot_score_bars(bars, list(tasks), titles, heading, out)
