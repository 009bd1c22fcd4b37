"""``python -m talklora_pl export CKPT --out DIR``: the adapter folder of a checkpoint."""

from __future__ import annotations

from typing import Literal

from talklora_pl.cli.parse import parse
from talklora_pl.errors import UserError


def export(
    checkpoint: str,
    out: str | None = None,
    base: str | None = None,
    license: str | None = None,
    merge: Literal["exact", "static"] | None = None,
    data: str | None = None,
    eval_data: str | None = None,
    form: Literal["lora", "weights"] = "lora",
    rank: int | None = None,
    for_: Literal["vllm"] | None = None,
    rows: str | None = None,
    format: str | None = None,
    limit: int = 1000,
    max_new_tokens: int = 32,
    device: str | None = None,
    push: str | None = None,
    public: bool = False,
    plugins: list[str] | str = (),  # type: ignore[assignment]
    trust_remote_code: bool = False,
) -> None:
    """Write the adapter folder of a checkpoint.

    Args:
        checkpoint: checkpoint file, or folder of a run (its best, else last).
        out: folder to write; an adapter folder is replaced.
        base: other place of the base model, which the folder will also name.
        license: of the adapter, for the model card, such as apache-2.0.
        merge: exact (or nothing): write the whole model with the adapter merged into its weights; static: fold the mean
            routing weights, measured on data, into one LoRA of PEFT, with a report of what that costs.
        data: rows to measure the routing weights on, with --merge static; one or several files with commas between.
        eval_data: rows to judge the static merge by; by default a fifth of data, which is held back.
        form: of the static merge: a LoRA folder of PEFT, or the whole model (weights).
        rank: truncate the LoRA to it.
        for_: (--for) vllm: one rank for all layers; what vLLM cannot serve is refused.
        rows: what a row of the data is; by default as in the run.
        format: how a row is written as text; by default as in the run.
        limit: rows to read at most, of data and of eval_data.
        max_new_tokens: of an answer that is generated to be judged; 0: none is.
        device: where to measure; by default a GPU where there is one.
        push: OWNER/NAME on the hub, where the adapter folder is uploaded to.
        public: a repository that push creates is public.
        plugins: modules or .py files with components of your own.
        trust_remote_code: run Python code that comes with the base.
    """
    if out is None:
        raise UserError("export: --out DIR is required.")
    if merge == "exact" and (push or license):
        raise UserError("export: --merge writes a model, not an adapter folder, so --push and --license do not apply.")
    given = {"data": data, "eval-data": eval_data, "rank": rank, "for": for_, "rows": rows, "format": format}
    if merge != "static" and (static := [f"--{name}" for name, value in given.items() if value is not None]):
        raise UserError(f"export: {', '.join(static)} are for --merge static.")
    if merge == "static" and data is None:
        raise UserError(
            "export: --merge static needs --data ROWS: the routing weights that it folds in are measured on them, and "
            "a part that is held back (or --eval-data) tells what is lost. (--merge alone is exact, for adapters whose "
            "routing is constant.)"
        )
    if merge == "static" and push:
        raise UserError("export: --push uploads an adapter folder; upload a static merge with `hf upload`.")

    from talklora_pl.export.run import export_checkpoint, merge_checkpoint
    from talklora_pl.registry import import_plugins

    import_plugins(plugins)
    if merge == "static":
        import rich

        from talklora_pl.export.run_static import REPORT, StaticOptions, static_checkpoint

        assert data is not None
        options = StaticOptions(data, eval_data, form, rank, for_, rows, format, limit, max_new_tokens, license, device)
        report = static_checkpoint(checkpoint, out, options, base)
        rich.print(report.fidelity.table(), *report.sentences(), sep="\n")
        print(f"{'LoRA' if form == 'lora' else 'Model'}: {out} (the report: {REPORT})")
        return
    if merge:
        print(f"Merged model: {merge_checkpoint(checkpoint, out, base)}")
        return
    folder = export_checkpoint(checkpoint, out, base, license, trust_remote_code)
    print(f"Adapter: {folder}")
    if push:
        from talklora_pl.adapter.hub import push_adapter

        print(f"Pushed: {push_adapter(folder, push, private=not public)}")


def main(verb: str, argv: list[str]) -> None:
    """The verb."""
    # --merge alone is --merge exact
    kinds = ("exact", "static")
    pairs = zip(argv, [*argv[1:], ""])
    argv = [f"{arg}=exact" if arg == "--merge" and after not in kinds else arg for arg, after in pairs]
    export(**parse(verb, export, argv, positional=True))
