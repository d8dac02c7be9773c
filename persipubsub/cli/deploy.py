"""Write and check configuration files, create queues, add and remove subscribers."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import click.shell_completion

from persipubsub import config, control, errors
from persipubsub.cli import options, text


@options.command("Key of the queue, and its directory.")
@options.option("--publisher", str, "pub", "Id of the publisher.")
@options.option("--subscriber subscribers", str, ["sub"], "Id; may be repeated.", multiple=True)
def new(call: options.Call, publisher: str, subscribers: Sequence[str]) -> None:
    """
    Write a short configuration file to start from. It names its JSON Schema, for editors.

    The command writes the schema to a file beside it. CONFIG must not exist yet.

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
    config.parse(written.encode(), call.path)
    schema = call.path.with_name("persipubsub.schema.json")
    with open(call.path, "x", encoding="utf-8") as file:
        file.write(written)
    schema.write_text(options.to_json(config.schema(), indent=2), encoding="utf-8")
    call.tell(f"{call.path}: written; run persipubsub init {call.path} next",
              path=str(call.path),
              schema=str(schema))


@options.each_queue("Initialize only this queue.")
def init(call: options.Call, key: str) -> options.Told:
    """
    Create the queues of CONFIG, add their subscribers, and store their settings.

    It may be repeated at any time: messages stay. Run it as the user whose programs use the queues.

    Example:
        persipubsub init /etc/app/config.json
    """
    control.initialize_all_dbs(call.config, key)
    path = call.config.queue_path(key)
    return f"ready in {path}", {"path": path}


@options.command("Compare only this queue with the file.")
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
    lines: list[str] = []
    try:
        for key in call.keys():
            warnings += [f"{key}: {warning}" for warning in _warnings(call, key)]
        counts = (text.count(len(getattr(call.config, f"{noun}s")), noun)
                  for noun in ("queue", "publisher", "subscriber"))
        lines = [f"{call.path}: fine: {', '.join(counts)}"]
    except errors.ConfigError as error:
        problems = error.problems
    for line in (*(f"warning: {warning}" for warning in warnings), *problems):
        text.complain(line)
    if problems:
        call.fail(f"{text.count(len(problems), 'problem')} in {call.path}")
    call.tell(*lines, problems=problems, warnings=warnings)


def _warnings(call: options.Call, key: str) -> Iterator[str]:
    """Compare a queue with the file."""
    yield from control.check_durability(call.config, key)[key]
    try:
        differing = control.stored_settings(call.config, key)
    except errors.PersipubsubError as error:
        # That a queue is not there yet is no difference.
        if not isinstance(error, errors.NotInitializedError):
            yield str(error)
        return
    for name, (ours, stored) in differing.items():
        if name != "subscribers":
            shown = f"{ours!r} in the file, and {stored!r} in the queue"
            yield f"{name} is {shown}; init applies the value of the file"
            continue
        for one in sorted({*ours} ^ {*stored}):
            place = "file; init adds it" if one in ours else "queue; remove-subscriber removes it"
            yield f"the subscriber {one} is only in the {place}"


@options.one_queue
@click.argument("subscriber")
def add_subscriber(call: options.Call, key: str, subscriber: str) -> options.Told:
    """
    Add SUBSCRIBER to a queue, also while it is in use.

    The subscriber gets what is sent from now on. CONFIG itself is not changed; the command prints
    what to change there.

    Example:
        persipubsub add-subscriber config.json archive --queue greetings
    """
    is_new = control.add_subscriber(call.config, key, subscriber)
    entry = json.dumps({subscriber: {"in_queue": key}})[1:-1]
    done = "was added" if is_new else "is there already, and stays as it is"
    told = f"Add it to {call.path}, too: to queues.{key}.subscribers, and as an entry {entry}."
    return f"{subscriber} {done}. {told}", {"subscriber": subscriber, "added": is_new}


@options.one_queue
@options.subscriber
@options.yes
def remove_subscriber(call: options.Call, key: str, subscriber: str, yes: bool) -> options.Told:
    """
    Remove SUBSCRIBER from a queue, also while it is in use.

    Messages that no other subscriber needs are removed, too. CONFIG itself is not changed; the
    command prints what to change there. End the processes of the subscriber first: they fail
    afterwards.

    Example:
        persipubsub remove-subscriber config.json archive --queue greetings
    """
    lag = {one.subscriber: one.lag for one in control.statistics(call.config, key)[key].subscribers}
    if subscriber in lag and not yes:
        call.ask(f"Remove {subscriber} from {key}, with {text.count(lag[subscriber], 'message')} "
                 f"that it did not acknowledge?")
    unread = control.remove_subscriber(call.config, key, subscriber)
    line = (f"{subscriber} was removed, with {text.count(unread, 'message')} that it did not "
            f"acknowledge. Remove it from {call.path}, too: from queues.{key}.subscribers, from "
            f"those of publishers, and its own entry. Otherwise init adds it again.")
    return line, {"subscriber": subscriber, "unread": unread}


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
    click.shell_completion.shell_complete(ctx.find_root().command, {}, "persipubsub",
                                          "_PERSIPUBSUB_COMPLETE", f"{shell}_source")
