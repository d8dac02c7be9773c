"""Make configuration files, queues and subscribers ready, complete what is typed."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click
import click.shell_completion

import persipubsub.config
import persipubsub.control
import persipubsub.errors
from persipubsub.cli import options, text

__all__ = ["new", "init", "check_config", "add_subscriber", "remove_subscriber", "completion"]


@options.command("Key of the queue, and its directory.")
@options.option("--publisher", str, "pub", "Id of the publisher.")
@options.option("--subscriber subscribers", str, ["sub"], "May be repeated.", multiple=True)
def new(call: options.Call, publisher: str, subscribers: Sequence[str]) -> None:
    """
    Write a short configuration file to start from. It names its JSON Schema, for editors.

    The schema is written to a file beside it. CONFIG must not exist yet.

    Example:
        persipubsub new config.json --queue greetings --subscriber print --subscriber archive
    """
    key = call.queue_key or "messages"
    queues = {key: {"subscribers": subscribers}}
    content: dict[str, Any] = {"$schema": "./persipubsub.schema.json", "queues": queues}
    content.setdefault(publisher, {})["out_queue"] = key
    for one in subscribers:
        content.setdefault(one, {})["in_queue"] = key
    written = json.dumps(content, indent=4) + "\n"
    persipubsub.config.parse(written.encode(), call.path)
    schema = call.path.with_name("persipubsub.schema.json")
    try:
        with open(call.path, "x", encoding="utf-8") as file:
            file.write(written)
        schema.write_text(options.to_json(persipubsub.config.schema(), indent=2), encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"Expected to write the new file {error.filename}, but got: "
                                   f"{error.strerror}") from None
    call.tell(f"{call.path}: written; run persipubsub init {call.path} next",
              path=str(call.path),
              schema=str(schema))


@options.each_queue("Initialize only this queue.")
def init(call: options.Call, key: str) -> tuple[str, object]:
    """
    Create the queues of CONFIG, add their subscribers, and store their settings.

    It may be repeated at any time: messages stay. Run it as the user whose programs use the queues.

    Example:
        persipubsub init /etc/app/config.json
    """
    persipubsub.control.initialize_all_dbs(call.config, key)
    path = call.config.queue_path(key)
    return f"ready in {path}", {"path": path}


@options.command("Compare only this queue with the file.", name="check-config")
def check_config(call: options.Call) -> None:
    """
    List all problems of CONFIG, and where its queues differ from it.

    No queue is changed; "init" applies the settings of CONFIG. For queues on servers
    (nats://...?monitor=http://host:8222), it warns if a server flushes less than their durability
    promises.

    Example:
        persipubsub check-config config.json
    """
    problems: Sequence[str] = ()
    warnings: list[str] = []
    try:
        for key in call.keys():
            warnings += [f"{key}: {warning}" for warning in _warnings(call, key)]
    except persipubsub.errors.ConfigError as error:
        problems = error.problems
    for line in (*(f"warning: {warning}" for warning in warnings), *problems):
        text.complain(line)
    counts = []
    if problems:
        call.fail(f"{text.count(len(problems), 'problem')} in {call.path}")
    else:
        counts = [
            text.count(len(getattr(call.config, f"{noun}s")), noun)
            for noun in ("queue", "publisher", "subscriber")
        ]
    if counts or call.as_json:
        call.tell(f"{call.path}: fine: {', '.join(counts)}", problems=problems, warnings=warnings)


def _warnings(call: options.Call, key: str) -> list[str]:
    """Compare a queue with the file."""
    warnings = list(persipubsub.control.check_durability(call.config, key)[key])
    differing: Mapping[str, tuple[Any, Any]]
    try:
        differing = persipubsub.control.stored_settings(call.config, key)
    except persipubsub.errors.NotInitializedError:
        return warnings
    except persipubsub.errors.PersipubsubError as error:
        return [*warnings, str(error)]
    for name, (ours, stored) in differing.items():
        if name != "subscribers":
            warnings.append(f"{name} is {ours!r} in the file, and {stored!r} in the queue; init "
                            f"applies that of the file")
            continue
        for one in sorted({*ours} ^ {*stored}):
            place = "file; init adds it" if one in ours else "queue; remove-subscriber removes it"
            warnings.append(f"the subscriber {one} is only in the {place}")
    return warnings


@options.command("Which queue; needed if CONFIG has several.", name="add-subscriber")
@click.argument("subscriber")
def add_subscriber(call: options.Call, subscriber: str) -> None:
    """
    Add SUBSCRIBER to a queue, also while it is in use.

    The subscriber gets what is sent from now on. CONFIG itself is not changed; the command prints
    what to change there.

    Example:
        persipubsub add-subscriber config.json archive --queue greetings
    """
    key = call.key()
    is_new = persipubsub.control.add_subscriber(call.config, key, subscriber)
    entry = json.dumps({subscriber: {"in_queue": key}})[1:-1]
    done = "was added" if is_new else "is there already, and stays as it is"
    told = f"{call.path} has to name it in queues.{key}.subscribers, and in an entry {entry}."
    call.tell_of(key, f"{subscriber} {done}. {told}", subscriber=subscriber, added=is_new)


@options.command("Which queue; needed if CONFIG has several.", name="remove-subscriber")
@options.subscriber
@options.yes
def remove_subscriber(call: options.Call, subscriber: str, yes: bool) -> None:
    """
    Remove SUBSCRIBER from a queue, also while it is in use.

    Messages that no other subscriber needs are removed, too. CONFIG itself is not changed; the
    command prints what to change there. End the processes of the subscriber first: they fail
    afterwards.

    Example:
        persipubsub remove-subscriber config.json archive --queue greetings
    """
    key = call.key()
    found = persipubsub.control.statistics(call.config, key)[key].subscribers
    for lag in [one.lag for one in found if one.subscriber == subscriber and not yes]:
        call.ask(f"Remove {subscriber} from {key}, with {text.count(lag, 'message')} that it did "
                 f"not acknowledge?")
    unread = persipubsub.control.remove_subscriber(call.config, key, subscriber)
    call.tell_of(
        key, f"{subscriber} was removed, with {text.count(unread, 'message')} that it did not "
        f"acknowledge. Remove it from {call.path}, too: from queues.{key}.subscribers, from those "
        f"of publishers, and its own entry. Otherwise init adds it again.",
        subscriber=subscriber,
        unread=unread)


@click.command(cls=options.Plain)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """
    Print a script that completes commands, options, and the ids of the configuration file.

    The shell has to run the script when it starts. Ids are completed after CONFIG, or if
    PERSIPUBSUB_CONFIG names the file.

    Examples:
        persipubsub completion bash > ~/.local/share/bash-completion/completions/persipubsub
        persipubsub completion zsh > ~/.zfunc/_persipubsub
        persipubsub completion fish > ~/.config/fish/completions/persipubsub.fish
    """
    kind = click.shell_completion.get_completion_class(shell)
    assert kind is not None
    print(kind(ctx.find_root().command, {}, "persipubsub", "_PERSIPUBSUB_COMPLETE").source())
