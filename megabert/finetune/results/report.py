"""What came out: results.json, a Markdown table, a picture."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megabert.finetune.base_model import Start
from megabert.finetune.jobs.job import PRETRAINED, RANDOM_INIT, TFIDF, Job
from megabert.finetune.protocol import MNLI, Protocol
from megabert.finetune.tasks.task import EIGHT, Task

TITLES = {
    PRETRAINED: "fine-tuned, pretrained",
    RANDOM_INIT: "fine-tuned, from random weights",
    TFIDF: "TF-IDF + linear model",
}


def summarize(jobs: list[Job], results: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Task -> contender -> mean, std (of the sample; None of one seed), n, planned, metrics, scores, failed.

    Of a sweep the candidate with the best mean counts. What failed or did not run yet is in no mean, and named.
    """
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for task in dict.fromkeys(job.task.name for job in jobs):
        for contender in TITLES:
            mine = [job for job in jobs if job.task.name == task and job.contender == contender]
            if mine:
                summary.setdefault(task, {})[contender] = _summarize_one(mine, results)
    return summary


def _summarize_one(jobs: list[Job], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    candidates = {
        number: [job for job in jobs if job.candidate == number]
        for number in dict.fromkeys(job.candidate for job in jobs)
    }
    done = {
        number: [results[job.name] for job in some if results.get(job.name, {}).get("status") == "done"]
        for number, some in candidates.items()
    }
    failed = {
        job.name: result["error"] for job in jobs if (result := results.get(job.name)) and result["status"] == "failed"
    }
    missing = [job.name for job in jobs if job.name not in results]
    finished = {number: some for number, some in done.items() if some}
    outcome: dict[str, Any] = {"mean": None, "std": None, "n": 0, "scores": [], "metrics": {}, "seconds": 0.0}
    best = next(iter(candidates))
    if finished:
        best = max(finished, key=lambda number: statistics.mean(result["score"] for result in finished[number]))
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
            "seconds": sum(result["seconds"] for some in finished.values() for result in some),
            "train_examples": finished[best][0]["train_examples"],
            "dev_examples": finished[best][0]["dev_examples"],
        }
    job = candidates[best][0]
    outcome |= {
        "planned": len(candidates[best]), "candidates": len(candidates), "settings": job.settings.__dict__, "counting": job.counting,
        "start": MNLI if job.from_mnli else "checkpoint", "failed": failed, "missing": missing,
    }  # fmt: skip
    return outcome


def average(summary: dict[str, dict[str, dict[str, Any]]]) -> tuple[float | None, str]:
    """The unweighted mean over GLUE's eight tasks, or over those that ran, and what it is of; None if any job is lacking."""
    counted = [task for task in summary if task != "wnli"]
    parts = [summary[task][PRETRAINED] for task in counted]
    title = "mean of GLUE's eight" if sorted(counted) == sorted(EIGHT) else f"mean of {', '.join(counted)} only"
    if not parts:
        return None, "mean of nothing"
    if any(part["failed"] or part["missing"] or part["mean"] is None for part in parts):
        return None, f"{title}: withheld, for jobs are lacking"
    return statistics.mean(part["mean"] for part in parts), title


def as_results(
    checkpoint: str, start: Start, protocol: Protocol, without_mnli: list[str], summary: dict[str, Any]
) -> dict[str, Any]:
    """The content of results.json."""
    mean, title = average(summary)
    return {
        "checkpoint": checkpoint, "checkpoint_sha256": start.sha256, "protocol": protocol.name, "protocol_about": protocol.about,
        "without_mnli_start": without_mnli, "average": mean, "average_of": title, "tasks": summary,
    }  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def as_markdown(results: dict[str, Any], tasks: list[Task]) -> str:
    """The table: scores times 100, as papers print them."""
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
            each = ", ".join(f"{name} {_number(value)}" for name, value in part["metrics"].items())
            count = f"{part['n']}" if part["n"] == part["planned"] else f"{part['n']} of {part['planned']}"
            lines.append(
                f"| {task} | {TITLES[contender]} | {_number(part['mean'])} | {_number(part['std'])} | {count} | "
                f"{each or ', '.join(metrics[task])} | {'' if contender == TFIDF else part['start']} | "
                f"{part.get('train_examples', 0):,} / {part.get('dev_examples', 0):,} | {part['seconds']:.0f} |"
            )
            notes += [f"- FAILED: {name}: {error}" for name, error in part["failed"].items()]
            notes += [f"- not run yet: {name}" for name in part["missing"]]
            if part["candidates"] > 1:
                notes.append(f"- {task}: the best of {part['candidates']} candidates, by this very score")
            if part["counting"]:
                notes.append(f"- {task}, {TITLES[contender]}: the score is {' and '.join(part['counting'])} alone")
    lines.append(
        f"| **average** | {TITLES[PRETRAINED]} | {_number(results['average'])} | | | {results['average_of']} | | | |"
    )
    if results["without_mnli_start"]:
        named = ", ".join(results["without_mnli_start"])
        notes.append(
            f"- NOT the protocol: {named} started from the checkpoint, not from MNLI's encoder (--allow-no-mnli)"
        )
    lines += ["", "Scores are times 100; std is over seeds; examples: training / scored.", *notes]
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], out: Path) -> None:
    """A bar per task and contender, with the standard deviation where there is one."""
    tasks = results["tasks"]
    contenders = [name for name in TITLES if any(name in parts for parts in tasks.values())]
    figure = Figure(figsize=(max(5.0, 1.3 * len(tasks) + 2), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(contenders)
    for place, contender in enumerate(contenders):
        for number, parts in enumerate(tasks.values()):
            if (part := parts.get(contender)) and part["mean"] is not None:
                at = number + (place - (len(contenders) - 1) / 2) * width
                axes.bar(
                    at, 100 * part["mean"], 0.92 * width, yerr=100 * (part["std"] or 0) or None, color=f"C{place}", capsize=3,
                    label=TITLES[contender],
                )  # fmt: skip
    axes.set_xticks(range(len(tasks)), list(tasks))
    axes.set_ylabel("score x 100")
    mean = results["average"]
    axes.set_title(f"{results['protocol']}" + ("" if mean is None else f": average {100 * mean:.2f}"), fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(list(unique.values()), list(unique), fontsize=8, loc="lower right")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(out, dpi=120)
