"""What a linear reader finds in the image features after finished runs, and what scoring takes.

    moram xtail --preset small --method moram --out OUT/moram
    python benchmarks/streams/image_probe.py OUT/moram --out FILE.csv

Each run's model is read back as it was after the last task, from its state, which `image_streams`
removes. `probe` is the accuracy of RAIL-Dual's
kernel ridge alone on its features: fitted to the training images of all domains at once, scored on
the test images among all classes. It tells features from classifiers: it is no method, because it
reads all images together after the last task. `text` is the accuracy of those features with the
run's own texts. MoE-Adapters has features of its own for every task: there both are empty.
`ms_image` is the median time to classify an image, texts encoded before, in batches of 256;
`s_texts` is what encoding all prompts takes once.
"""

import argparse
import csv
import time
from dataclasses import fields
from pathlib import Path
from statistics import mean, median

import torch

from moram.harness.files import read_json
from moram.methods.rail import RAILDual
from moram.xtail.images import TestImages
from moram.xtail.run import XtailRun
from moram.xtail.settings import XtailSettings

BATCH, REPEATS = 256, 3


def read_back(folder):
    """A finished run with the model as it is after the last task, and its results."""
    results, names = read_json(folder / "results.json"), {f.name for f in fields(XtailSettings)}
    settings = {k: v for k, v in results["settings"].items() if k in names}
    settings |= {"out": str(folder), "quiet": True, "threads": 1}
    run = XtailRun(XtailSettings(**settings))
    run.check()
    run.prepare()
    # A model that never changes has nothing to read back.
    if any(run.plan.stages):
        run.restore()
    run.model.eval()
    return run, results


@torch.no_grad()
def accuracies(run):
    """(probe, text): for each, the accuracy on every domain in percent."""
    rail = RAILDual()
    for place in range(len(run.stream)):
        rail.end_task(run.model, place, run.stage((place,)))
    texts = run.clip.encode_text(run.prompt_ids)
    regression = rail._regression(texts.shape[1], texts.device)
    probe, text = [], []
    for images, offset in zip(run.test, run.plan.offsets, strict=True):
        features = torch.cat([run.clip.encode_image(b.pixels()) for b in images.batches(BATCH)])
        truth = images.labels + offset
        for found, scores in (
            (probe, regression(features.to(rail.dtype))),
            (text, run.clip.logits(features, texts)),
        ):
            found.append(100 * (scores.argmax(1) == truth).double().mean().item())
    return probe, text


@torch.no_grad()
def seconds(run):
    """(seconds to encode all texts, seconds an image)."""
    began = time.perf_counter()
    classify = run.method.classifier(run.clip, run.prompt_ids)
    texts, found = time.perf_counter() - began, []
    # Every domain's images alike, and none whose features were kept.
    images = [TestImages(run.clip, t.split, run.store, run.transforms) for t in run.test]
    batches = [batch for one in images for batch in one.batches(BATCH)]
    for batch in batches:
        batch.pixels()
    for _ in range(REPEATS):
        began = time.perf_counter()
        for batch in batches:
            classify(batch)
        found.append((time.perf_counter() - began) / sum(map(len, batches)))
    return texts, median(found)


def row(folder):
    """A row of the table."""
    run, results = read_back(folder)
    tasks = results["tasks"]
    found = {"name": results["name"], "method": results["method"]}
    found |= {"seed": results["settings"]["seed"], "last": f"{results['summary']['last']:.1f}"}
    probe, text = [], []
    if results["method"] != "moe-adapters":
        probe, text = accuracies(run)
    for title, scores in (("probe", probe), ("text", text)):
        found[title] = f"{mean(scores):.1f}" if scores else ""
        found |= {f"{title} {task}": "" for task in tasks}
        found |= {f"{title} {t}": f"{s:.1f}" for t, s in zip(tasks, scores, strict=False)}
    texts, image = seconds(run)
    return found | {"s_texts": f"{texts:.3f}", "ms_image": f"{1000 * image:.3f}"}


def main(argv=None):
    """Write a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--out", type=Path, required=True, help="a CSV file")
    arguments = parser.parse_args(argv)
    rows = []
    for folder in arguments.runs:
        rows.append(row(folder))
        print(rows[-1], flush=True)
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
