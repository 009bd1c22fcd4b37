"""``python -m talklora_pl export CKPT --out DIR``: the adapter folder of a checkpoint."""

from __future__ import annotations

import argparse
from typing import NoReturn

from talklora_pl.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"export: {message}. Options: python -m talklora_pl export --help")


def main(argv: list[str]) -> int:
    """Entry of the command line; errors of the user are UserErrors."""
    parser = _Parser(prog="python -m talklora_pl export", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint file, or folder of a run (its best, else last)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; an adapter folder is replaced")
    parser.add_argument("--base", help="other place of the base model, which the folder will also name")
    parser.add_argument("--license", help="of the adapter, for the model card, such as apache-2.0")
    parser.add_argument(
        "--merge", action="store_true", help="write the whole model with the adapter merged into its weights instead"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload the adapter folder to the hub")
    parser.add_argument("--public", action="store_true", help="a repository that --push creates is public")
    parser.add_argument("--plugins", nargs="*", default=[], help="modules or .py files with your own components")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the base")
    given = parser.parse_args(argv)
    if given.merge and (given.push or given.license):
        parser.error("--merge writes a model, not an adapter folder, so --push and --license do not apply")

    from talklora_pl.export.run import export_checkpoint, merge_checkpoint
    from talklora_pl.registry import import_plugins

    import_plugins(given.plugins)
    if given.merge:
        print(f"Merged model: {merge_checkpoint(given.checkpoint, given.out, given.base)}")
        return 0
    folder = export_checkpoint(given.checkpoint, given.out, given.base, given.license, given.trust_remote_code)
    print(f"Adapter: {folder}")
    if given.push:
        from talklora_pl.adapter.hub import push_adapter

        print(f"Pushed: {push_adapter(folder, given.push, private=not given.public)}")
    return 0
