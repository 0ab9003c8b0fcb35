"""`resprune prompt`: write a fixed question as JSON."""

import argparse
import json
from pathlib import Path

from resprune.runtime.errors import ResPruneError, printable
from resprune.runtime.options import add_bundle, listed


def register_prompt(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `resprune prompt`."""
    parser = subparsers.add_parser(
        "prompt",
        help="write a fixed question as JSON, for devices without tokenizer and Python",
        description="Write a fixed question as JSON, for devices without tokenizer and Python.",
    )
    add_bundle(parser)
    parser.add_argument("question", metavar="QUESTION", help="what is asked, in one argument")
    parser.add_argument("--out", required=True, metavar="JSON", help="file to write")
    parser.add_argument(
        "--images", type=int, default=1, metavar="N", help="images in the prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--about",
        metavar="WORDS",
        help='keywords that guide the selection: "square,table" (default: the question\'s nouns)',
    )
    parser.add_argument(
        "--plain-text", action="store_true", help="take special tokens such as </s> in the question as text"
    )
    parser.add_argument("--skip-hashes", action="store_true", help="do not check the SHA-256 of the files")
    parser.set_defaults(run=_prompt)


def _prompt(arguments: argparse.Namespace) -> int:
    from resprune.runtime.bundle.files import read_bundle
    from resprune.runtime.bundle.whole import write_whole
    from resprune.runtime.prompt.fixed import fixed_prompt

    bundle = read_bundle(arguments.bundle, check_hashes=not arguments.skip_hashes)
    about = None if arguments.about is None else listed(arguments.about)
    prompt = fixed_prompt(
        bundle, arguments.question, images=arguments.images, about=about, plain_text=arguments.plain_text
    )
    out = Path(arguments.out)
    try:
        write_whole(out, json.dumps(prompt, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise ResPruneError(
            f"{out} cannot be written ({error.strerror}); give --out a file in a folder that is there"
        ) from None
    keywords = ", ".join(prompt["keywords"]) or "none"
    print(printable(f"{out}: {len(prompt['ids'])} tokens; keywords: {keywords}"))
    return 0
