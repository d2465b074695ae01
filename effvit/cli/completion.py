"""``effvit completion``: a script that lets bash, zsh or fish complete commands, options, models, methods and files.

The script is made of the parsers of all commands and holds the names of models and methods, so that the shell need not
start Python at each key. ``effvit.cli.options`` has the types that say what an argument takes.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import timm

import effvit
from effvit.cli import options
from effvit.dense.shipped_configs import list_configs

__all__ = ["Slot", "add_command", "bash_script", "fish_script", "zsh_script"]

SHELLS = ("bash", "zsh", "fish")
MODELS, METHODS, SELECTORS, CONFIGS = "models", "methods", "selectors", "configs"
FILES, FOLDERS, NOTHING = "files", "folders", ""
NAMED = (MODELS, METHODS, SELECTORS, CONFIGS)  # kinds whose names the script holds
# What a shell offers for each type of argument; values of other types are for the user to know.
KINDS: dict[object, str] = {
    options.model_name: MODELS,
    options.method_name: METHODS,
    options.selector_name: SELECTORS,
    options.config_name: CONFIGS,
    options.config_file: FILES,
    options.image_name: FILES,
    options.output_file: FILES,
    options.output_folder: FOLDERS,
    Path: FILES,
}
MANY = 999  # values of an option, or positional arguments, that any number of may be given


class Arguments(argparse.Namespace):
    """Parsed arguments of ``effvit completion``."""

    shell: str


class Slot(NamedTuple):
    """What one option or positional argument takes.

    Attributes:
        names: Of the option, such as ("--method",); none for a positional argument.
        values: How many values follow, at most.
        kind: What they are, one of the constants above.
        choices: The values there are, where they are few.
        help: What it is for.
    """

    names: tuple[str, ...]
    values: int
    kind: str
    choices: tuple[str, ...]
    help: str


def add_command(commands: options.Commands) -> None:
    """Add the command's arguments; ``run`` of what is parsed is the function to call."""
    command = commands.add_parser(
        "completion",
        help="a script for bash, zsh or fish that completes commands, options and names",
        description="Print a script that completes `effvit` in SHELL. It holds the names of the models that are "
        "installed now: write it to a file, and again after an update. docs/command_line.md says where.",
    )
    command.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    command.set_defaults(run=run_completion, commands=commands)


def run_completion(arguments: Arguments) -> None:
    """Print the script for the shell."""
    scripts: dict[str, Callable[[dict[str, list[Slot]]], str]] = {
        "bash": bash_script,
        "zsh": zsh_script,
        "fish": fish_script,
    }
    print(scripts[arguments.shell](slots_of(arguments.commands)))


def slots_of(commands: options.Commands) -> dict[str, list[Slot]]:
    """Words of a command -> what it takes; nothing for the first words of commands of several."""
    found: dict[str, list[Slot]] = {}
    for words, parser in options.leaves(commands).items():
        found.setdefault(words.rpartition(" ")[0] or words, [])
        found[words] = [slot_of(action) for action in parser._actions if action.help != argparse.SUPPRESS]
    return found


def slot_of(action: argparse.Action) -> Slot:
    """What an action of a parser takes."""
    values = 1 if action.nargs in (None, "?") else action.nargs if isinstance(action.nargs, int) else MANY
    kind = KINDS.get(action.type, NOTHING)
    choices = tuple(map(str, action.choices or ()))
    return Slot(tuple(action.option_strings), values, kind, choices, action.help or "")


def names_of(kind: str) -> list[str]:
    """The names of a kind; none where the shell knows them."""
    if kind == MODELS:
        return timm.list_models()
    if kind == METHODS:
        return effvit.list_methods()
    if kind == SELECTORS:
        return effvit.list_selectors()
    return [config.name for config in list_configs()] if kind == CONFIGS else []


def first_words(slots: dict[str, list[Slot]]) -> dict[str, list[str]]:
    """Words of a command, "" before the first -> the words that may follow as commands."""
    found: dict[str, list[str]] = {}
    for words in slots:
        before, _, last = words.rpartition(" ")
        found.setdefault(before, []).append(last)
    return found


HEADER = """\
# Completions of effvit {version} for {shell}, written by `effvit completion {shell}`.
"""


# -- bash and zsh ----------------------------------------------------------------------------------------

# Walks the words before the cursor: which command they are of, and whether the last option still takes values. Plain
# enough for bash 3.2, and for zsh through its bashcompinit.
WALK = """\
_effvit() {
  local word command='' option='' left=0 place=0 i slot current="${COMP_WORDS[COMP_CWORD]}"
  for ((i = 1; i < COMP_CWORD; i++)); do
    word="${COMP_WORDS[i]}"
    if _effvit_is_command "${command:+$command }$word"; then
      command="${command:+$command }$word"
    elif [[ $word == -?* ]]; then
      option="$word"; left="$(_effvit_slot "$command" "$word")"; left="${left%% *}"; left="${left:-0}"
    elif ((left > 0)); then
      left=$((left - 1))
    else
      place=$((place + 1))
    fi
  done
  COMPREPLY=()
  if [[ $current == -* ]]; then
    COMPREPLY=($(compgen -W "$(_effvit_options "$command")" -- "$current"))
    return
  elif ((left > 0)); then
    slot="$(_effvit_slot "$command" "$option")"
  else
    slot="$(_effvit_slot "$command" "$place")"
  fi
  case "${slot#* }" in
    models) COMPREPLY=($(compgen -W "$_effvit_models" -- "$current")) ;;
    methods) COMPREPLY=($(compgen -W "$_effvit_methods" -- "$current")) ;;
    configs) COMPREPLY=($(compgen -W "$_effvit_configs" -- "$current")) ;;
    files | folders) ;;  # left to the shell, as all that nothing is known of
    *) COMPREPLY=($(compgen -W "${slot#* } $(_effvit_commands "$command")" -- "$current")) ;;
  esac
}
complete -o default -F _effvit effvit"""


def bash_script(slots: dict[str, list[Slot]]) -> str:
    """The script that bash sources."""
    return HEADER.format(version=effvit.__version__, shell="bash") + walking(slots)


def zsh_script(slots: dict[str, list[Slot]]) -> str:
    """The script that zsh sources: that of bash, which zsh runs through its bashcompinit."""
    begin = "autoload -Uz compinit bashcompinit\n(($+functions[compdef])) || compinit\nbashcompinit\n"
    return (
        HEADER.format(version=effvit.__version__, shell="zsh") + begin + walking(slots) + "complete -F _effvit effvit\n"
    )


def walking(slots: dict[str, list[Slot]]) -> str:
    """What bash and zsh have in common: the names, tables as functions, and the walk over the words."""
    tables = [f"_effvit_{kind}={shlex.quote(' '.join(names_of(kind)))}" for kind in NAMED]
    commands = dict.fromkeys(slots, "return 0")
    options_of = {words: printed(" ".join(n for slot in own for n in slot.names)) for words, own in slots.items()}
    below = {words: printed(" ".join(following)) for words, following in first_words(slots).items()}
    values = {
        f"{words} {name}": printed(f"{slot.values} {slot.kind or ' '.join(slot.choices)}")
        for words, own in slots.items()
        for name, slot in named(own)
    }
    tables += [
        table("_effvit_is_command", commands, "return 1"),
        table("_effvit_options", options_of, printed("--help --version --debug")),
        table("_effvit_commands", below, ":"),
        table("_effvit_slot", values, ":"),
    ]
    return "\n".join(tables) + "\n" + WALK


def named(slots: Sequence[Slot]) -> Iterator[tuple[str, Slot]]:
    """Slots under the names of options, and under the places of positional arguments, as patterns of a shell."""
    place = 0
    for slot in slots:
        yield from ((name, slot) for name in slot.names)
        if not slot.names:
            yield ("[0-9]*" if slot.values == MANY else str(place), slot)
            place += 1


def table(name: str, entries: dict[str, str], other: str) -> str:
    """A function of bash that does for its arguments what the entries say, else the other."""
    grouped: dict[str, list[str]] = {}
    for pattern, what in entries.items():
        grouped.setdefault(what, []).append(f'"{pattern.removesuffix("[0-9]*")}"{"[0-9]*" * pattern.endswith("*")}')
    lines = [f"    {'|'.join(patterns)}) {what} ;;" for what, patterns in grouped.items()]
    return "\n".join([f"{name}() {{", '  case "$*" in', *lines, f"    *) {other} ;;", "  esac", "}"])


def printed(words: str) -> str:
    """The command of a shell that prints the words."""
    return f"echo {shlex.quote(words)}"


# -- fish ------------------------------------------------------------------------------------------------


def fish_script(slots: dict[str, list[Slot]]) -> str:
    """The script that fish sources; of options with several values it completes the first."""
    lines = [HEADER.format(version=effvit.__version__, shell="fish") + "complete -c effvit -f"]
    for kind in NAMED:
        lines.append(f"function __effvit_{kind}; printf '%s\\n' {' '.join(names_of(kind))}; end")
    for before, following in first_words(slots).items():
        others = f"; and not __fish_seen_subcommand_from {' '.join(following)}"
        condition = f"__fish_seen_subcommand_from {before}{others}" if before else "__fish_use_subcommand"
        lines.append(f"complete -c effvit -n {fish_text(condition)} -a {fish_text(' '.join(following))}")
    for words, own in slots.items():
        condition = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in words.split())
        for slot in own:
            parts = ["complete -c effvit -n", fish_text(condition)]
            for name in slot.names:
                parts.append(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}")
            parts.append(fish_values(slot))
            if slot.names:
                parts.append(f"-d {fish_text(slot.help)}")
            if slot.names or slot.kind or slot.choices:
                lines.append(" ".join(part for part in parts if part))
    return "\n".join(lines)


def fish_values(slot: Slot) -> str:
    """How fish completes what a slot takes."""
    if slot.values == 0:
        return ""
    if slot.kind == FILES:
        return "-r -F" if slot.names else "-F"
    exclusive = "-x " if slot.names else ""
    if slot.kind == FOLDERS:
        return f"{exclusive}-a '(__fish_complete_directories)'"
    if slot.kind:
        return f"{exclusive}-a '(__effvit_{slot.kind})'"
    return f"{exclusive}-a {fish_text(' '.join(slot.choices))}" if slot.choices else exclusive.strip()


def fish_text(text: str) -> str:
    """A text in the quotes of fish, where a backslash stands before backslashes and quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
