"""``funcattrib query``: training examples whose gradients align with a text's."""

import json
import logging
import sys
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal

from funcattrib.cli.flags import setting_names, with_flags
from funcattrib.cli.output import reports_on_stderr
from funcattrib.cli.settings import ShardConfig
from funcattrib.errors import FuncattribError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Query:
    """Find the training examples whose gradients align with a text's.

    Without --text, texts are read from a prompt, one a line. Of several processes the first reads, searches and shows;
    with --shard-params all of them compute the text's gradient together.
    """

    index: Path
    """The folder of a run that build wrote."""
    model: str | None = None
    """The model that made the store; by default the one it names."""
    tokenizer: str | None = None
    """The tokenizer, if it is not the model's."""
    state: Path | None = None
    """The fitted state that the store is to have been built with; another one is refused."""
    text: str | None = None
    """The query."""
    completion: str | None = None
    """Continuation of --text whose tokens alone count in the query's loss."""
    label: str | None = None
    """Label of --text where the store's model classifies: a class by number or name, or a list of numbers."""
    top_k: int = 5
    """Number of examples of each query that are found and shown, the best."""
    reverse: bool = False
    """Opponents (lowest scores) in place of proponents."""
    unique: bool = False
    """Show each text once, whatever its case, white space and unicode form."""
    unit_norm: bool = False
    """Cosine in place of inner product."""
    faiss: str | None = None
    """Search through a FAISS index of this factory string (Flat, IVF1,SQfp16, HNSW32, …) instead of exactly."""
    mmap_index: bool = False
    """Leave the FAISS index on the disk and map it."""
    nprobe: int | None = None
    """Inverted lists that FAISS visits; by default 16."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto takes a GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8", "int4"] | None = None
    """Type of the weights; by default the one the store was built with."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""
    shards: ShardConfig = field(default_factory=ShardConfig)
    record: Path | None = None
    """Also append what is found to this csv file."""

    def __post_init__(self) -> None:
        """Check what a type cannot say."""
        if self.top_k < 1:
            raise FuncattribError(f"expected --top-k of at least 1, found {self.top_k}")
        if self.nprobe is not None and self.nprobe < 1:
            raise FuncattribError(f"expected --nprobe of at least 1, found {self.nprobe}")
        for flag, given in (("--nprobe", self.nprobe is not None), ("--mmap-index", self.mmap_index)):
            if given and self.faiss is None:
                raise FuncattribError(f"{flag} requires --faiss")
        for flag, value in (("--completion", self.completion), ("--label", self.label)):
            if value is not None and self.text is None:
                raise FuncattribError(f"{flag} requires --text")


@reports_on_stderr
def run(config: Query) -> int | None:
    """Answer --text, or the texts of a prompt loop."""
    from funcattrib.cli.load import shards_from
    from funcattrib.data import Columns
    from funcattrib.models.loading import PRECISIONS, load_model
    from funcattrib.query.attributor import Attributor
    from funcattrib.query.csv_log import append_csv
    from funcattrib.query.faiss_index import FaissConfig
    from funcattrib.query.stored_loss import check_named
    from funcattrib.report.table import hits_table
    from funcattrib.runtime.devices import pick_device
    from funcattrib.runtime.world import world
    from funcattrib.store import read_manifest
    from funcattrib.store.compatibility import check_kind

    here = world()
    manifest = read_manifest(config.index)
    check_kind(manifest, config.index, "gradients")  # before a model is loaded
    if here.is_rank_zero and manifest.loss["kind"] == "ce" and "task" not in manifest.loss:
        log.info(
            "this store's loss is cross-entropy: `funcattrib trackstar`, or a store built with `--loss log_odds` and "
            "asked with `--unit-norm`, finds more of the sentences that the model has memorised"
        )
    check_named(manifest)
    _check_asked(config, manifest.loss.get("task"))
    made_with = manifest.model
    device = pick_device(config.device)
    loaded = load_model(
        config.model or made_with["id"],
        tokenizer=config.tokenizer,
        revision=made_with["revision"] if config.model is None else None,
        precision=config.precision or PRECISIONS.get(made_with["dtype"], "fp32"),
        device=str(device),
        trust_remote_code=config.trust_remote_code,
        shards=shards_from(config.shards, config.device),
    )
    faiss_cfg = (
        FaissConfig(config.faiss, mmap_index=config.mmap_index, nprobe=config.nprobe or 16, device=str(device))
        if config.faiss and here.is_rank_zero
        else None
    )
    attributor = Attributor(
        config.index,
        model=loaded,
        device=device,
        unit_norm=config.unit_norm,
        faiss_cfg=faiss_cfg,
        state=config.state,
    )

    kept = manifest.data.get("keep_columns", ())

    def answer(text: str, completion: str | None = None) -> None:
        columns = Columns("text", "completion" if completion is not None else None)
        record: dict[str, Any] = {"text": text, "completion": completion}
        if config.label is not None:
            record["label"] = _label(config.label)
        row = attributor.gradients([record], columns=columns)
        if not here.is_rank_zero:
            return
        hits = attributor.best(row, config.top_k, reverse=config.reverse, unique=config.unique)[0]
        asked = text if completion is None else f"{text}{completion}"
        print(hits_table(hits, asked, kept=kept))
        if config.record is not None:
            append_csv(config.record, asked, hits, reverse=config.reverse, unit_norm=config.unit_norm)

    if config.text is not None:
        answer(config.text, config.completion)
        return None
    if isinstance(sys.stdin, TextIOWrapper):  # bytes of another encoding are refused line by line, as half characters
        sys.stdin.reconfigure(errors="surrogateescape")
    while (text := here.broadcast_object(_next_text() if here.is_rank_zero else None)) is not None:
        try:
            answer(text)
        except FuncattribError as error:  # the next text may do better
            print(f"funcattrib query: {with_flags(str(error), setting_names(Query))}", file=sys.stderr)
    return None


def _check_asked(config: Query, task: str | None) -> None:
    """Check that the query has what the store's loss reads, before a model is loaded."""
    if config.label is not None and task != "sequence_classification":
        raise FuncattribError("--label requires a store of a sequence classification model; leave it out")
    for wanted, flag, given in (
        ("sequence_classification", "--label", config.label),
        ("seq2seq", "--completion", config.completion),
    ):
        if task == wanted and given is None:
            model = "classifies" if flag == "--label" else "is an encoder-decoder"
            raise FuncattribError(f"the model of this store {model}: a query requires --text with {flag}")


def _label(text: str) -> Any:
    """Return the label as a number or a list of numbers, where it is one; else as the name that it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _next_text() -> str | None:
    """Read the next text of the prompt, None where there are no more."""
    asks = sys.stdin.isatty()
    while True:
        try:
            text = input("text> " if asks else "").strip()
        except EOFError:
            return None
        if text in ("exit", "quit") or (asks and not text):
            return None
        if text:
            return text
