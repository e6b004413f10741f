"""``pretrain <command> [key=value …]``: help that teaches, the resolved configuration, and one-line errors."""

import ast
import re
import sys
from pathlib import Path

from data.fault import Fault
from data.redaction import redacted
from pretrain.overview import COMMANDS, said_at_once
from pretrain.plan import composed_run
from pretrain.run.launched import rank
from pretrain.run.progress import say
from pretrain.settings.annotation import annotated, ranges_of
from pretrain.settings.command_schema import file_stem
from pretrain.settings.composition import Composed, load, of_the_command_line
from pretrain.settings.config_files import CONFIGS, choices_of, places, with_parents
from pretrain.settings.refusals import nearest, other_stage
from pretrain.settings.sweeps import Sweep, sweep_of

INSTEAD = {
    option: sentence
    for options, sentence in (
        (
            "-n -cn --config-name",
            (
                "the command says which configuration it is, recipe=NAME chooses its values, and --config-dir DIR adds"
                " your own"
            ),
        ),
        ("-cp --config-path", "--config-dir DIR adds a folder of your own YAML"),
        ("-i --info", "--cfg job prints every value with the file that set it"),
        ("-p --package", "--cfg job prints the whole configuration"),
        ("-r --run", "a command runs unless --cfg job or --help is asked for"),
        ("-sc --shell-completion", "--help prints all settings of a command, and 'pretrain --help' all commands"),
        ("--experimental-rerun", "the same command goes on with a run"),
        ("--hydra-help", "--help says what a command does, and all its settings"),
    )
    for option in options.split()
}
"""What is used here in place of Hydra's options."""


@of_the_command_line()
def parse(arguments: list[str]) -> Composed | Sweep | None:
    """The checked configuration that ``arguments`` ask for, those of a sweep, or None where they asked for help, a
    version or ``--cfg``.

    Raises Fault for an unknown command or setting.
    """
    if text := said_at_once(arguments):
        print(text)
        return None
    # 'doctor slide' is a command, and so is 'doctor', which settings or options may follow.
    two_words = any(command.startswith(f"{arguments[0]} ") for command in COMMANDS)
    if two_words and "stage=slide" in arguments and f"{arguments[0]} slide" in COMMANDS:
        arguments = [arguments[0], "slide", *(word for word in arguments[1:] if word != "stage=slide")]
    if arguments[0] == "tile" and any(word.startswith("replay=") for word in arguments) and arguments[1] != "replay":
        arguments = ["tile", "replay", *arguments[1:]]
    length = 2 if two_words and not re.match("[-+~]|.*=", "".join(arguments[1:2])) else 1
    command, rest = " ".join(arguments[:length]), arguments[length:]
    if command == f"{arguments[0]} tile" and f"{arguments[0]} slide" in COMMANDS:
        raise Fault(f"there is no command {command!r}: 'pretrain {arguments[0]}' is the one for tiles.")
    if command not in COMMANDS:
        raise Fault(f"there is no command {command!r}{nearest(command, set(COMMANDS))} 'pretrain --help' lists them.")
    overrides, config_dirs = [], []
    wants_help = wants_config = sweeps = resolves = False
    words = iter(part for word in rest for part in _apart(word))
    for word in words:
        if word in ("-h", "--help"):
            wants_help = True
        elif word in ("--cfg", "-c"):
            if next(words, None) != "job":
                raise Fault(
                    "--cfg takes the word 'job': it prints the whole resolved configuration; Hydra's own settings have"
                    " no effect here."
                )
            wants_config = True
        elif word == "--resolve":
            resolves = True
        elif word in ("--multirun", "-m"):
            sweeps = True
        elif word in ("--config-dir", "-cd"):
            folder = Path(given := next(words, ""))
            if not given or not folder.is_dir():
                raise Fault(
                    f"--config-dir {given or 'without a name'} is not a folder; it may hold recipe/, model/, … with"
                    " your own YAML files."
                )
            config_dirs.append(folder)
        elif word in INSTEAD:
            raise Fault(f"there is no option {word} here: {INSTEAD[word]}.")
        elif word.startswith("-"):
            raise Fault(
                f"there is no option {word!r}; settings are written key=value, and the options are --help, --cfg job,"
                " --config-dir and --multirun."
            )
        else:
            overrides.append(word)
    if wants_help:
        print(explain(command))
        return None
    if resolves and not wants_config:
        raise Fault("--resolve is of --cfg job, which prints the configuration, and resolved it is: give both.")
    if sweeps and wants_config:
        raise Fault("--cfg job is of one run: leave --multirun out, and give each setting one value.")
    if sweeps:
        return sweep_of(command, overrides, config_dirs)
    if command == "plan":  # it takes a run's settings beside its own
        overrides = composed_run.set_run_words_aside(overrides, config_dirs)
    composed = load(command, overrides, config_dirs)
    if composed.left_out and rank() is None:
        say(composed.says_left_out())
    if wants_config:
        print(redacted(annotated(composed)))
        return None
    return composed


def _apart(word: str) -> list[str]:
    """An option that holds its value is two words."""
    return (
        word.split("=", 1)
        if re.match(r"--?(cfg|c|config-dir|cd|config-name|cn|config-path|cp|info|i)=", word)
        else [word]
    )


def explain(command: str) -> str:
    """The text of ``pretrain <command> --help``: its module's docstring, its settings, its groups."""
    name = file_stem(command)
    source = Path(__file__).parent / "commands" / f"{name}.py"
    text = ast.get_docstring(ast.parse(source.read_text())) or ""
    body = (CONFIGS / f"{name}.yaml").read_text()
    allowed = ranges_of(load(command, []))
    sections = [text, f"Settings (configs/{name}.yaml):\n\n{_indent(_without_defaults(with_ranges(body, allowed)))}"]
    for group in re.findall(r"^  - (?:override )?/?(\w+): (?:\w+|null)", body, flags=re.M):
        options = [
            choice for choice in choices_of(group, [CONFIGS]) if not other_stage(command, group, choice, [CONFIGS])
        ]
        chosen = re.search(rf"^  - (?:override )?/?{group}: (\w+)", body, flags=re.M)
        default = chosen.group(1) if chosen else "null"
        sections.append(f"{group}= one of: {', '.join(options)} (default {default})")
        if default != "null" and group != "recipe":
            files = reversed(with_parents(group, default, [CONFIGS]))
            texts = [_without_defaults(with_ranges(file.read_text(), allowed, prefix)) for prefix, file in files]
            sections.append(_indent(_indent("\n".join(texts))))
    if "launch" not in body:
        sections.append(
            f"launch= one of: {', '.join(choices_of('launch', [CONFIGS]))} (default local): where it runs; 'pretrain"
            f" {command} launch=slurm --cfg job' prints the settings of a job, and launch.dry_run=true its script"
        )
    sections.append(f"'pretrain {command} --cfg job' prints them all resolved, with where each value comes from.")
    return "\n\n".join(sections)


def with_ranges(text: str, allowed: dict[str, str], prefix: str = "") -> str:
    """A text of YAML with what its values may be behind their comments, unless these say so; keys of ``allowed`` begin
    with ``prefix``."""
    lines = text.splitlines()
    for name, place in places(text).items():
        words = allowed.get(f"{prefix}{name}")
        if words and not set(re.findall(r"\w+", words)) - {"or"} <= set(re.findall(r"\w+", lines[place])):
            lines[place] += f" [{words}]" if " # " in lines[place] else f"  # [{words}]"
    return "\n".join(lines) + "\n"


def _without_defaults(text: str) -> str:
    return re.sub(r"^defaults:\n(?:[ -].*\n)*\n?", "", text, flags=re.M).strip()


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" if line else "" for line in text.splitlines())


def fail(fault: Fault) -> None:
    """End the command with its one line on standard error and the fault's exit code."""
    print(f"{fault.trace}pretrain: {fault}", file=sys.stderr)
    sys.exit(fault.code)
