"""A finished run handed on: merged, as an adapter, or as GGUF. `steep export` is `export_run`."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from steep.data.heldout import HeldoutDocuments, first_trained_by_domain
from steep.errors import RunError, UserError, did_you_mean
from steep.evaluation.board import gate_table
from steep.evaluation.score import DomainScore, scored_otherwise
from steep.export.adapter import write_adapter
from steep.export.adapter_weights import AdapterWeights
from steep.export.base_weights import Kind
from steep.export.card import CONVERTER_NOTE, adapter_notes, original_name, write_card
from steep.export.gate import BITS_LIMIT, Gap, Measured, compare, free_memory, measure, measure_folder
from steep.export.gguf import check_convertible, write_gguf
from steep.export.gguf_check import GgufJudge
from steep.export.gguf_tokenizer import is_misread_by_converter
from steep.export.merged import Merger
from steep.export.push import check_push, push
from steep.export.story import Gated, Story, describe_base
from steep.export.weight_check import wrong_weight
from steep.model.attention import attention
from steep.model.install import fused_of
from steep.model.load import DTYPES, QUANTISED, as_folder
from steep.model.resolve import read_tokenizer_folder, resolve
from steep.out_of_memory import memory_told
from steep.plan import Plan
from steep.result import finished, first_and_last, load_result, plan_again
from steep.resume import has_other_text
from steep.run_folder import RunFolder
from steep.schema import RunConfig
from steep.storage import published
from steep.terminal import Terminal

FORMS, BASES = ("merged", "adapter", "gguf"), ("auto", "original")
_TRAINED_DOCUMENTS = 16  # a domain, where nothing was held out
_SAME_MODEL = 0.005  # bits per byte between what the run recorded at its end and what its result scores now
_CHECKED_DOCUMENTS = 8  # a domain, by which a GGUF file is held against the merged folder


def export_run(
    run_dir: str | Path,
    output: str | Path,
    *,
    to: str = "merged",
    base: str = "auto",
    push_to: str | None = None,
    trust_remote_code: bool = False,
    terminal: Terminal | None = None,
    api: Any = None,
) -> dict[str, Any]:
    """Write the result of a finished run into a folder that others open, and prove that it is the trained model.

    Args:
        output: a folder that is not there yet, or empty. It appears when all of it is written and the gate is passed.
        to: ``merged`` (a whole model in 16 bits), ``adapter`` (PEFT's format) or ``gguf`` (f16 and q8_0 files).
        base: what to merge a run over a quantised base into. ``auto`` measures the dequantised weights that it trained
            over and the 16-bit originals, and keeps the better; over fp8 it keeps the originals unless they are worse
            by more than `BITS_LIMIT`. ``original`` takes the originals, whatever it costs.
        push_to: USER/NAME on the Hugging Face hub, to upload the folder to.
        trust_remote_code: see `steep.result.finished`.
        api: a `huggingface_hub.HfApi`.

    Returns:
        ``{"path", "base", "gaps", "address"}``: the folder; what was merged into; the gap to the adapter by kind of
        base, by domain in bits per byte; where it was uploaded.

    Raises:
        UserError: an input is wrong; nothing was written.
        RunError: the merged model is not the trained one, or the hub refused the upload.
    """
    terminal = terminal or Terminal(quiet=True)
    for field, value, known in (("--to", to, FORMS), ("--base", base, BASES)):
        if value not in known:
            remedy = f"{did_you_mean(value, known)} It is one of {', '.join(known)}.".lstrip()
            raise UserError(field, f"{value!r} is unknown", remedy)
    if to == "adapter" and base != "auto":
        raise UserError("--base", "an adapter is merged into nothing", "Leave it out, or export --to merged or gguf.")
    if push_to is not None:
        check_push(push_to)
    output = Path(output)
    _check_output(output)
    config, folder = finished(run_dir, trust_remote_code=trust_remote_code)
    adapter = AdapterWeights(folder.final)
    read_tokenizer_folder(folder.final)  # goes with every form
    export = _Export(config, folder, adapter, output, push_to or output.name, terminal)
    with memory_told(None):
        result = export.adapter() if to == "adapter" else export.merged(to, base)
    terminal.say(f"result: {output}")
    if push_to is not None:
        result["address"] = push(output, push_to, terminal.say, api)
        terminal.say(f"uploaded: {result['address']}")
    return {"path": output, "base": None, "gaps": {}, "address": None} | result


def next_step(output: Path, to: str) -> str:
    """What to do with an export, in a line."""
    place = shlex.quote(str(output))
    return {
        "merged": f"next: vllm serve {place}, or AutoModelForCausalLM.from_pretrained({str(output)!r})",
        "adapter": f"next: PeftModel.from_pretrained(base_model, {str(output)!r})",
        "gguf": f"next: ollama create {shlex.quote(output.name)} -f {shlex.quote(str(output / 'Modelfile'))}",
    }[to]


class _Export:
    """One export: what each form shares."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        adapter: AdapterWeights,
        output: Path,
        name: str,
        terminal: Terminal,
    ) -> None:
        self._config, self._folder, self._adapter = config, folder, adapter
        self._output, self._name, self._terminal = output, name, terminal
        settings = config.model
        self._resolved = resolve(
            settings.name,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            rope_scaling=settings.rope_scaling,
        )
        self._base = describe_base(settings.name, settings.revision, self._resolved)
        before, after = first_and_last(folder.read_lines("evaluation.jsonl"))
        rows = folder.read_lines("evaluation.jsonl")
        self._story = Story(
            settings=config.model_dump(),
            **{name: _read(folder, name) for name in ("plan", "ledger", "environment")},
            before=before,
            after=after,
            roles={row["domain"]: row["role"] for row in rows},
            scored_otherwise=scored_otherwise(rows),
        )

    def adapter(self) -> dict[str, Any]:
        size = sum(file.stat().st_size for file in self._folder.final.rglob("*"))
        _check_disk(self._output, size if self._adapter.whole else 2 * size)  # written in fp32, and in one rank
        self._terminal.say("writing the adapter and its card")
        with published(self._output, existing="refuse") as staging:
            write_adapter(self._adapter, staging, self._base.name, self._base.revision)
            grew = self._vocabulary_grew()
            write_card(
                staging, self._base, self._story, form="adapter", gated=None, name=self._name, vocabulary_grew=grew
            )
        for note in adapter_notes(self._base, self._story):
            self._terminal.warn(note)
        return {}

    def merged(self, form: str, base: str) -> dict[str, Any]:
        config, terminal = self._config, self._terminal
        plan = plan_again(config, self._folder, terminal)
        original = plan.tokenizer if plan.vocabulary is None else plan.vocabulary.original
        merger = Merger(
            as_folder(self._resolved, original),
            self._adapter,
            base=plan.base,
            compute_dtype=DTYPES[plan.compute],
        )
        if form == "gguf":
            check_convertible(merger.config, plan.tokenizer)
        self._refuse_other_text(plan)
        kinds = _kinds(config, plan, base, merger.stored_quantised)
        exact = kinds[0]
        # A GGUF export adds a file of 16 bits a weight and one of 8.5.
        _check_disk(self._output, int(merger.num_bytes * (len(kinds) + (1.6 if form == "gguf" else 0))))
        documents, text = _documents(plan)
        if not plan.corpus.heldout:
            terminal.say(f"comparing on {text}")
        opened: dict[str, Any] = {
            "dtype": DTYPES[plan.compute],
            "attention": attention(config.model.attn_implementation, self._resolved.config),
        }
        how: dict[str, Any] = {
            "max_length": config.data.max_length,
            "stride": config.evaluation.stride,
            "max_tokens": config.evaluation.max_tokens,
            "autocast_dtype": plan.precision,
        }
        terminal.say("scoring the adapter over the base of the run")
        model = load_result(config, plan.resolved, plan.tokenizer, self._folder)
        in_fp8 = plan.choices.fp8_products == "both"
        own = None
        if in_fp8 and fused_of(model).fp8 == "both":
            own = measure(model, documents, **how).scores
            self._refuse_other_model(own)
            terminal.say("scoring it again without its products in fp8, which the merged model has none of")
            fused_of(model).fp8 = "none"
        trained = measure(model, documents, **how)
        if not in_fp8:
            self._refuse_other_model(trained.scores)
        measured: dict[Kind, Measured] = {}
        with published(self._output, existing="refuse") as staging:
            for kind in kinds:
                terminal.say(f"merging into the {kind} base, and reading every weight back")
                with terminal.merging() as show:
                    merger.write(staging / kind, kind, tokenizer=self._folder.final, progress=show)
                self._refuse(wrong_weight(staging / kind, model, merger.tensors, kind))
            del model
            free_memory()
            for kind in kinds:
                terminal.say(f"opening the merged model ({kind}) with plain transformers, and scoring it")
                measured[kind] = measure_folder(staging / kind, trained, documents, **opened, **how)
            gaps: dict[Kind, Gap] = {kind: compare(trained, found) for kind, found in measured.items()}
            terminal.show(gate_table(trained.scores, {kind: found.scores for kind, found in measured.items()}, own))
            self._refuse(gaps[exact].problem(may_fall=plan.base == "int8"))
            kept = _kept(measured, gaps, base, plan.base)
            gap, other = gaps[kept], next((gaps[kind] for kind in gaps if kind != kept), None)
            gated = Gated(kept, kept == exact, gap, trained, measured[kept], other, text, own)
            checks = {}
            if form == "gguf":
                checks = self._write_gguf(staging, staging / kept, _as_text(documents, plan.tokenizer))
            else:
                for file in (staging / kept).iterdir():
                    file.rename(staging / file.name)
            for left in kinds:
                shutil.rmtree(staging / left)
            misread = form == "merged" and is_misread_by_converter(staging)
            write_card(
                staging,
                self._base,
                self._story,
                form=form,
                gated=gated,
                name=self._name,
                checks=checks,
                misread_by_converter=misread,
            )
        if misread:
            terminal.warn(CONVERTER_NOTE)
        if base == "auto" and len(gaps) > 1:
            close = plan.base == "fp8" and kept == "original"
            terminal.say(f"merged into the {kept} base: {'fp8 is close to it' if close else 'the better of the two'}")
        self._warn_of_a_rise(kept, gaps[kept], exact)
        return {"base": kept, "gaps": {kind: found.bits_per_byte for kind, found in gaps.items()}}

    def _refuse(self, problem: str | None) -> None:
        if problem is not None:
            raise RunError(
                f"the merged model is not the trained one: {problem}. Nothing was written to {self._output}. "
                "Please report this, with the run file"
            )

    def _refuse_other_text(self, plan: Plan) -> None:
        if has_other_text(self._folder, plan):
            raise UserError(
                "run folder",
                "the text, or how the tokenizer reads it, is not what the run had, so it cannot score the result",
                "Put the files back as they were, or hand on the adapter: --to adapter.",
            )

    def _refuse_other_model(self, scores: Sequence[DomainScore]) -> None:
        """Hold what was scored now, in the run's own arithmetic, against what it recorded at its end."""
        recorded = {score.domain: score.bits_per_byte for score in self._story.after}
        for score in scores:
            if score.domain in recorded and not abs(score.bits_per_byte - recorded[score.domain]) <= _SAME_MODEL:
                raise RunError(
                    f"this is not the model that the run ended with: {score.domain} is {score.bits_per_byte:.4f} bits "
                    f"per byte now and was {recorded[score.domain]:.4f}. Put base model and final/ back as they were"
                )

    def _write_gguf(self, staging: Path, merged: Path, texts: Sequence[str]) -> dict[str, str]:
        """Write and check the GGUF files of a merged folder.

        Returns:
            What the check says of each file, by its name.

        Raises:
            RunError: a file is not the merged model.
        """
        self._terminal.say("writing GGUF files")
        files = write_gguf(merged, staging, self._name.rsplit("/", 1)[-1])
        said, judge = {}, GgufJudge(merged, texts)
        for file in files:
            if file.suffix != ".gguf":
                continue
            self._terminal.say(f"checking {file.name}")
            check = judge.check(file)
            if check.problems:
                raise RunError(
                    f"{file.name} is not the merged model: {'; '.join(check.problems[:3])}. Nothing was written to "
                    f"{self._output}. Please report this, with the run file"
                )
            for remark in check.remarks:
                self._terminal.warn(f"{file.name}: {remark}")
            said[file.name] = f"{check.judge}: {check}"
            self._terminal.say(f"{file.name}: {said[file.name]}")
        del judge
        free_memory()
        return said

    def _warn_of_a_rise(self, kept: Kind, gap: Gap, exact: Kind) -> None:
        if kept != exact and not gap.rise <= BITS_LIMIT:
            self._terminal.warn(
                f"merged into {original_name(self._base)} the model is worse by up to {gap.rise:.4f} bits per byte: "
                "the adapter has learned to correct the quantisation that it was trained over. --base auto measures "
                "the dequantised base too, and keeps the better."
            )

    def _vocabulary_grew(self) -> bool:
        tables = [name for name in self._adapter.whole if name.endswith("embed_tokens.weight")]
        rows = self._resolved.config.get_text_config().vocab_size
        return any(self._adapter.embedding_shape(name)[0] > rows for name in tables)


def _kinds(config: RunConfig, plan: Plan, base: str, stored_quantised: bool) -> list[Kind]:
    """The bases to merge into and measure: first the one that was trained over, which proves the merge.

    Raises:
        UserError: the original is asked for where there is none, or where it cannot be right.
    """
    if plan.base not in QUANTISED:
        return ["original"]
    if stored_quantised:
        reason = f"{Path(config.model.name).name} is stored in {plan.base} only"
    elif config.adapter.init_lora_weights == "loftq":
        reason = "a LoftQ adapter holds the quantisation's correction, which the original does not need"
    else:
        return ["dequantised", "original"]
    if base == "original":
        raise UserError("--base", reason, "Leave it at auto: merge into the dequantised base.")
    return ["dequantised"]


def _kept(measured: Mapping[Kind, Measured], gaps: Mapping[Kind, Gap], base: str, trained_over: str) -> Kind:
    """Which of the merged models is handed on."""
    if "original" in measured and (
        base == "original" or (trained_over == "fp8" and gaps["original"].rise <= BITS_LIMIT)
    ):
        return "original"
    return min(measured, key=lambda kind: measured[kind].bits_per_byte)


def _documents(plan: Plan) -> tuple[dict[str, HeldoutDocuments], str]:
    """What the gate scores, and what to call it."""
    if plan.corpus.heldout:
        return plan.corpus.heldout, "the run's held-out text"
    corpus = plan.corpus
    found = first_trained_by_domain(corpus.sources, corpus.sides, _TRAINED_DOCUMENTS)
    return found, "text that it was trained on, since nothing was held out"


def _as_text(documents: Mapping[str, HeldoutDocuments], tokenizer: Any) -> list[str]:
    """The first documents of each domain, as the tokenizer writes them out."""
    return [
        tokenizer.decode(document.tokens, skip_special_tokens=True)
        for domain in documents.values()
        for document in islice(domain, _CHECKED_DOCUMENTS)
    ]


def _check_output(output: Path) -> None:
    place = RunFolder(output)
    place.check_place("--output")
    if output.exists() and any(output.iterdir()):
        raise UserError("--output", f"{output} is not empty", "Give another folder, or remove it.")


def _check_disk(output: Path, needed: int) -> None:
    free = RunFolder(output).free_bytes()
    if free < needed:
        raise UserError(
            "--output",
            f"its disk has {free / 2**30:.1f} GiB free, and the export needs {needed / 2**30:.1f}",
            "Make room, or give a folder on another disk.",
        )


def _read(folder: RunFolder, name: str) -> dict[str, Any]:
    tree = folder.read_json(f"{name}.json")
    if not tree:
        raise UserError("run folder", f"{folder.path} has no {name}.json", "Give the folder of a finished run.")
    return tree
