"""Writes the tables of flags in README.md from the parsers of the scripts: `python tests/readme_flags.py` (`make fix-copies`)."""

import argparse
import importlib
import re
import sys
from pathlib import Path
from unittest import mock


ROOT = Path(__file__).parent.parent
BLOCK = r"<!-- flags of (.*?) -->\n(.*?)<!-- end of flags -->"


class Found(Exception):
    """Carries a parser out of the function that makes it."""


def parser_of(make_and_parse):
    """The parser that a function makes and parses with."""

    def found(parser, *args, **kwargs):
        raise Found(parser)

    with mock.patch.multiple(argparse.ArgumentParser, parse_args=found, parse_known_args=found):
        try:
            make_and_parse()
        except Found as carrier:
            return carrier.args[0]


def script_parser(script):
    return parser_of(importlib.import_module(script.removesuffix(".py")).parse_args)


def shown(default):
    """A default as it stands on the command line; what is off or unset is nothing."""
    if default is None or default is False or default == []:
        return ""
    return f"`{' '.join(map(str, default)) if isinstance(default, list) else default}`"


def table_of(scripts):
    """The flags of one script, or of two that have the same ones, as Markdown; a second script's own defaults stand behind."""
    first, *others = (script_parser(script) for script in scripts)
    lines = ["<details>", f"<summary>{', '.join(scripts)}</summary>", ""]
    for group in first._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if not actions:
            continue
        lines += [f"**{group.title}**" + (f": {group.description}" if group.description else ""), ""]
        lines += ["| flag | default | what it does |", "|---|---|---|"]
        for action in actions:
            defaults = ["required" if action.required else shown(action.default)]
            for other in others:
                (same,) = [option for option in other._actions if option.dest == action.dest]
                if same.default != action.default:
                    defaults.append(f"SDXL: {shown(same.default)}")
            choices = f" One of {', '.join(action.choices)}." if action.choices else ""
            names = ", ".join(f"`{name}`" for name in action.option_strings)
            text = (action.help + choices).replace("|", "\\|")
            lines.append(f"| {names} | {', '.join(defaults)} | {text} |")
        lines.append("")
    return "\n".join([*lines, "</details>"]) + "\n"


def with_tables(text):
    """A README with every table of flags as the parsers have them now."""

    def block(match):
        return f"<!-- flags of {match[1]} -->\n{table_of(match[1].split(', '))}<!-- end of flags -->"

    return re.sub(BLOCK, block, text, flags=re.S)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    path = ROOT / "README.md"
    text = path.read_text()
    if with_tables(text) != text:
        path.write_text(with_tables(text))
        print("README.md: tables of flags")
