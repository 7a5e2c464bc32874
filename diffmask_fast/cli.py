"""The command line: `diffmask-fast train | reproduce | explain | show | analyse | convert | doctor`."""

from __future__ import annotations

import gc
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:
    sys.exit("error: the command line needs typer: install the extras, as in pip install '.[all]'")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="At which layer does a frozen model know what it may forget?",
)
train_app = typer.Typer(
    no_args_is_help=True, help="Train a probe on a task; leaves metrics.json, probe and pictures in --out."
)
app.add_typer(train_app, name="train")
reproduce_app = typer.Typer(
    no_args_is_help=True, help="All of an experiment of the paper: report.html, tables and figures in --out."
)
app.add_typer(reproduce_app, name="reproduce")

Out = Annotated[Path, typer.Option(help="Folder for everything that the run leaves.")]
Reader = Annotated[str, typer.Option(help="Folder or hub name of a question-answering model.")]
Questions = Annotated[str, typer.Option(help="SQuAD JSON file or hub data set to train on.")]
EvalQuestions = Annotated[str, typer.Option("--eval", help="SQuAD JSON file or hub data set to measure on.")]
Seed = Annotated[int, typer.Option(help="Of everything drawn.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]


class RecipeName(str, Enum):
    steady = "steady"
    published = "published"


class QuestionsRecipeName(str, Enum):
    steady = "steady"
    decided = "decided"
    published = "published"


class Architecture(str, Enum):
    encoder = "encoder"
    gru = "gru"


class Masking(str, Enum):
    input = "input"
    hidden = "hidden"


MaskingOption = Annotated[Masking, typer.Option(help="Gate the inputs, or each site's own states.")]
BFloat16 = Annotated[
    bool | None,
    typer.Option(
        "--bf16/--no-bf16", help="Run the frozen model in bfloat16, or not; if not given, where the device has it."
    ),
]
RecipeOption = Annotated[RecipeName, typer.Option(help="steady: ours. published: the paper's code.")]
QuestionsRecipeOption = Annotated[
    QuestionsRecipeName,
    typer.Option(help="steady: ours. decided: of inputs, low sites drop some too. published: the paper's code."),
]


@train_app.command("toy")
def train_toy(out: Out, seed: Seed = 0, recipe: RecipeOption = RecipeName.steady, resume: Resume = False) -> None:
    """Digits in a sequence: train the network, then both probes, and compare with the known truth."""
    from diffmask_fast.report import terminal
    from diffmask_fast.tasks import toy

    metrics = toy.run(out, seed=seed, recipe=recipe.value, resume=resume)
    terminal.table(
        "DiffMask on the toy task: distance to the truth, in nats",
        ("site", "D_KL", "D_JS", "P(keep)"),
        [(name, site["kl"], site["js"], site["open"]) for name, site in metrics["sites"].items()],
    )
    typer.echo(f"task accuracy {metrics['task_accuracy']:.4f}, {metrics['seconds']} s; look at {out / 'report.html'}")


@train_app.command("squad")
def train_squad(
    model: Reader,
    train: Questions,
    evaluate: EvalQuestions,
    out: Out,
    masking: MaskingOption = Masking.input,
    seed: Seed = 0,
    recipe: QuestionsRecipeOption = QuestionsRecipeName.steady,
    resume: Resume = False,
    bf16: BFloat16 = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many questions of each file.")] = None,
    epochs: Annotated[float | None, typer.Option(min=0.0, help="Instead of the recipe's.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the frozen model's layers for training.")] = False,
    checkpoint_layers: Annotated[
        bool, typer.Option("--checkpoint-layers", help="Less memory on long texts, for a pass more.")
    ] = False,
    tokens_per_batch: Annotated[
        int | None, typer.Option(min=1, help="Batches of at most so many tokens, instead of the recipe's of examples.")
    ] = None,
) -> None:
    """Question answering: a probe over all sites."""
    from diffmask_fast.report import terminal
    from diffmask_fast.tasks import squad

    metrics = squad.run(
        model,
        train,
        evaluate,
        out,
        masking=masking.value,
        seed=seed,
        recipe=recipe.value,
        resume=resume,
        bf16=bf16,
        limit=limit,
        epochs=epochs,
        compile=compile,
        checkpoint_layers=checkpoint_layers,
        tokens_per_batch=tokens_per_batch,
    )
    rows = [(name, *(site[column] for column in squad.COLUMNS)) for name, site in metrics["sites"].items()]
    terminal.table(f"DiffMask, {masking.value} masking, on the evaluation questions", ("site", *squad.COLUMNS), rows)
    typer.echo(f"{metrics['seconds']} s; look at {out / 'report.html'}")


@train_app.command("sst")
def train_sst(
    model: Annotated[str, typer.Option(help="Folder or hub name of an encoder, with a head for the classes or not.")],
    train: Annotated[Path, typer.Option(help="File of sentiment trees to train on, one a line.")],
    evaluate: Annotated[Path, typer.Option("--eval", help="File of sentiment trees to measure on.")],
    out: Out,
    architecture: Annotated[
        Architecture, typer.Option(help="gru: a GRU classifier on the encoder's word embeddings.")
    ] = Architecture.encoder,
    classes: Annotated[int, typer.Option(min=2, max=5, help="5, or 2: without the neutral sentences.")] = 5,
    masking: Annotated[
        list[Masking] | None, typer.Option(help="Gate the inputs, or each site's own states; both if not given.")
    ] = None,
    seed: Seed = 0,
    recipe: RecipeOption = RecipeName.steady,
    resume: Resume = False,
    bf16: BFloat16 = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many sentences of each file.")] = None,
    epochs: Annotated[float | None, typer.Option(min=0.0, help="Of the probes, instead of the recipe's.")] = None,
    fine_tune_epochs: Annotated[float | None, typer.Option(min=0.0, help="Of the classifier.")] = None,
) -> None:
    """Sentiment: a classifier, fine-tuned if the model is none yet, and its probes over all sites."""
    from diffmask_fast.report import terminal
    from diffmask_fast.tasks import sst

    maskings = [one.value for one in masking or Masking]
    metrics = sst.run(
        model,
        train,
        evaluate,
        out,
        architecture=architecture.value,
        classes=classes,
        maskings=maskings,
        seed=seed,
        recipe=recipe.value,
        resume=resume,
        bf16=bf16,
        limit=limit,
        epochs=epochs,
        fine_tune_epochs=fine_tune_epochs,
    )
    for name in maskings:
        rows = [(site, *(row[column] for column in sst.COLUMNS)) for site, row in metrics[name]["sites"].items()]
        terminal.table(f"DiffMask, {name} masking, on the evaluation sentences", ("site", *sst.COLUMNS), rows)
    task, pages = metrics["task"], " and ".join(str(out / name / "report.html") for name in maskings)
    typer.echo(f"classifier: accuracy {task['accuracy']:.4f}, macro F1 {task['macro_f1']:.4f}")
    typer.echo(f"{metrics['seconds']} s; look at {pages}")


Quick = Annotated[bool, typer.Option("--quick", help="A small version of everything, in minutes.")]


@reproduce_app.command("toy")
def reproduce_toy(out: Out = Path("runs/reproduce-toy"), quick: Quick = False) -> None:
    """Every method at both sites of the toy task against the known truth."""
    from diffmask_fast.report import terminal
    from diffmask_fast.reproduce import toy

    metrics = toy.run(out, quick=quick)
    for site in ("hidden", "embedding"):
        table = toy.distance_table(site, metrics)
        terminal.table(table.title, table.columns, table.rows)
    typer.echo(f"look at {out / 'report.html'}")


@reproduce_app.command("sst")
def reproduce_sst(
    model: Annotated[str, typer.Option(help="Folder or hub name of an encoder; it is fine-tuned if it has no head.")],
    train: Annotated[str, typer.Option(help="File of sentiment trees to train on.")],
    evaluate: Annotated[str, typer.Option("--eval", help="File of sentiment trees to measure on.")],
    out: Out = Path("runs/reproduce-sst"),
    quick: Quick = False,
) -> None:
    """Sentiment: encoder and GRU, probes, all methods, exact search, analyses."""
    from diffmask_fast.reproduce import sst

    sst.run(model, train, evaluate, out, quick=quick)
    typer.echo(f"look at {out / 'report.html'}")


@reproduce_app.command("squad")
def reproduce_squad(
    model: Reader,
    train: Questions,
    evaluate: EvalQuestions,
    out: Out = Path("runs/reproduce-squad"),
    quick: Quick = False,
) -> None:
    """Question answering: probes of inputs and of hidden states, all methods, analyses."""
    from diffmask_fast.reproduce import squad

    squad.run(model, train, evaluate, out, quick=quick)
    typer.echo(f"look at {out / 'report.html'}")


@app.command()
def explain(
    model: Annotated[str, typer.Option(help="Folder or hub name of the model that the probe was trained on.")],
    probe: Annotated[Path, typer.Option(help="probe.safetensors of a run.")],
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    text: Annotated[list[str], typer.Option(help="A text, or a question; may be given several times.")],
    passage: Annotated[list[str] | None, typer.Option(help="The passage of each --text, for pairs.")] = None,
) -> None:
    """Explain texts with a trained probe; processes that `torchrun` started share them out."""
    from transformers import AutoTokenizer

    from diffmask_fast import processes
    from diffmask_fast.attribution.explain import explain as explain_texts
    from diffmask_fast.models import load_for
    from diffmask_fast.probes import load_probe
    from diffmask_fast.report import terminal

    if passage and len(passage) != len(text):
        raise ValueError(f"{len(text)} --text and {len(passage)} --passage: give one passage for each text, or none")
    texts = list(zip(text, passage, strict=True)) if passage else list(text)
    processes.join()
    result = explain_texts(load_for(model), load_probe(probe), texts, AutoTokenizer.from_pretrained(model), shared=True)
    if not processes.is_first():
        return
    result.save(out)
    for one in result:
        terminal.show(one)
    typer.echo(f"saved {out}; look at it again with: diffmask-fast show {out}")


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="attributions.safetensors, or the folder of a run.")],
    index: Annotated[int | None, typer.Option(help="One text, by number; without it the averages.")] = None,
    site: Annotated[int | None, typer.Option(help="Of --index: the site whose tokens are coloured.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Write a picture (.png, .pdf) here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to click through here.")] = None,
) -> None:
    """Look at attributions: terminal, picture, page."""
    from diffmask_fast.attribution import Attributions
    from diffmask_fast.report import terminal

    if site is not None and index is None:
        raise ValueError("--site is of one text: give its number with --index too")
    result = Attributions.load(path / "attributions.safetensors" if path.is_dir() else path)
    if index is None:
        terminal.summary(result)
    else:
        terminal.show(result[index], site)
    if figure is not None:
        from diffmask_fast.report import figure as figures

        figures.by_site(result, figure) if index is None else figures.heatmap(result[index], figure)
    if html is not None:
        from diffmask_fast.report import html as pages

        pages.write(result, html)


@app.command()
def analyse(
    paths: Annotated[list[Path], typer.Argument(help="attributions.safetensors, or folders of runs; several at once.")],
    out: Annotated[Path, typer.Option(help="Folder for the tables and the figures.")],
    squad: Annotated[
        str | None, typer.Option(help="The SQuAD JSON file or hub data set that was explained; with --model.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub name of the model that was explained.")] = None,
    faithful: Annotated[
        str | None, typer.Option(help="Ask the model about faithfulness too: the site whose states are masked.")
    ] = None,
) -> None:
    """Averages by part of speech and segment, agreement of runs, scores, and faithfulness."""
    from diffmask_fast.analysis.analyse import analyse as analysed
    from diffmask_fast.analysis.analyse import read_runs
    from diffmask_fast.analysis.findings import faithfulness_findings, write
    from diffmask_fast.report import terminal
    from diffmask_fast.report.tables import written

    if (squad is None) != (model is None) or (faithful is not None and model is None):
        raise ValueError("--squad and --model belong together, and --faithful needs both")
    runs = read_runs(paths)
    if squad is None or model is None:
        found = analysed(runs)
    else:
        from transformers import AutoTokenizer

        from diffmask_fast.tasks.squad import read_squad, squad_answers

        # a run may have been limited to the first questions
        pairs = read_squad(squad, "validation")[: len(runs[0])]
        answers = squad_answers(squad)[: len(runs[0])]
        tokenizer = AutoTokenizer.from_pretrained(model)
        found = analysed(runs, pairs, tokenizer, answers)
        if faithful is not None:
            from diffmask_fast.analysis.faithfulness import faithfulness
            from diffmask_fast.data import encode
            from diffmask_fast.models import load_for

            loaded = load_for(model)
            curves = faithfulness(loaded, encode(tokenizer, pairs, loaded), runs, site=faithful, show_progress=True)
            found += faithfulness_findings(curves, "faithfulness")
            out.mkdir(parents=True, exist_ok=True)
            curves.save(out / "faithfulness.json")
    write(found, out)
    for finding in found:
        rows = [[written(cell) for cell in row] for row in finding.table.rows]
        terminal.table(finding.table.title, finding.table.columns, rows)
    typer.echo(f"look at {out / 'tables'} and {out / 'figures'}")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of the published DiffMask code.")],
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    max_activation: Annotated[
        float | None, typer.Option(help="Of its gates, if not the 10 of the code or what the checkpoint says.")
    ] = None,
) -> None:
    """Make a probe of a published checkpoint."""
    from diffmask_fast.compat.checkpoints import convert as convert_checkpoint

    probe = convert_checkpoint(checkpoint, out, max_activation)
    typer.echo(f"saved {out}: {probe.masking} masking, {probe.num_sites} sites, states {probe.sizes[0]} wide")


@app.command()
def doctor() -> None:
    """Versions, backends, threads, and a short check of the operations against their oracles."""
    from diffmask_fast import doctor as check

    if not check.report():
        raise typer.Exit(1)


def _end_group() -> None:
    """End the group of processes that `torchrun` started, if there is one: the interpreter must not end before it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        gc.collect()  # the trainers, which are cycles, hold it too
        torch.distributed.destroy_process_group()


def main() -> None:
    """Run the command line; what a user can mend is one line, not a traceback."""
    try:
        app()
        _end_group()
    except (
        ValueError,
        TypeError,
        OSError,
        RuntimeError,
        IndexError,
        FloatingPointError,
    ) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except ImportError as error:
        sys.stderr.write(f"error: {error}: install the extras, as in pip install '.[all]'\n")
        sys.exit(1)
