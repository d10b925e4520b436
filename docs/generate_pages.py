"""MkDocs hook: pages made from other sources (the changelog, the options of the command line), and short code."""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from openvla_hf.cli import COMMANDS


CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"
COMMAND_LINE = """# Command line

`pip install openvla-hf` installs the command `openvla-hf`. Every command also takes `--json`, which prints one JSON
object on standard output and nothing else. The exit status is 0 for success, 2 for a wrong option or another user
error, which is described in one sentence on standard error, and 130 after Ctrl-C.
"""


class MarkdownFormatter(argparse.HelpFormatter):
    """Format a parser's help as Markdown: its usage, its description, and a definition list of its options."""

    def __init__(self, prog: str):
        """A formatter for the parser of the program `prog`."""
        super().__init__(prog)
        self.prog, self.parts = prog, []

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        """Add nothing: the options say how a command is called."""

    def start_section(self, heading: str | None) -> None:
        """Add nothing: options need no heading of their own."""

    def end_section(self) -> None:
        """Add nothing."""

    def add_text(self, text: str | None) -> None:
        """Add a paragraph."""
        self.parts.append(text or "")

    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        """Add an entry for each option or positional argument."""
        for action in actions:
            names = action.option_strings or [action.metavar or action.dest]
            takes_value = action.option_strings and action.nargs != 0
            value = f" {action.metavar or action.dest.upper().replace('-', '_')}" if takes_value else ""
            values = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
            required = " (required)" if action.required and action.option_strings else ""
            text = (action.help or "") % {**vars(action), "prog": self.prog}
            text = f"{text[:1].upper()}{text[1:]}".rstrip(".")
            self.parts.append(f"`{', '.join(names)}{value}`{required}\n:   {text}.{values}")

    def format_help(self) -> str:
        """Return everything that was added, as Markdown."""
        return "\n\n".join(part for part in self.parts if part)


def describe_commands() -> str:
    """Write the page of the command line, from the parsers of the commands."""
    sections = [COMMAND_LINE]
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        parser = argparse.ArgumentParser(
            f"openvla-hf {name}", description=command.__doc__, formatter_class=MarkdownFormatter, add_help=False
        )
        command.add_arguments(parser)
        sections.append(f"## {name}\n\n{parser.format_help()}\n\n```bash\nopenvla-hf {command.EXAMPLE}\n```\n")
    return "\n".join(sections)


def site_changelog() -> str:
    """Return the changelog, with its links relative to the folder of the docs."""
    return re.sub(r"\]\(docs/", "](", CHANGELOG.read_text(encoding="utf-8"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the collected ones."""
    files.append(File.generated(config, "changelog.md", content=site_changelog()))
    files.append(File.generated(config, "reference/cli.md", content=describe_commands()))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Mark short code, which the style sheet keeps on one line."""
    return re.sub(r"<code>(?=[^<]{1,24}</code>)", '<code class="short">', html)
