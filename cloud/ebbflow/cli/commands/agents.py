"""`ebbflow agent`: the devices of the fleet."""

from typing import Annotated, Any

import typer

from ebbflow.cli import values
from ebbflow.cli.options import Limit, Output, Yes, confirm, connect, example, group
from ebbflow.cli.output import Column, Format, pairs, print_list, print_one, when, word

app = group("Agents: the devices of the fleet.", "ebbflow agent list --selector site=berlin")

Name = Annotated[str, typer.Argument(metavar="AGENT", help='Such as "kiosk-7".')]


def _state(agent: Any) -> str:
    from ebbflow.api.v1.fleet_pb2 import Agent

    return word(Agent.State, agent.state)


def _serves(agent: Any) -> str:
    from ebbflow.api.v1.resources_pb2 import InstallationState, Precision

    return ", ".join(
        f"{values.short_release(one.release)} {word(Precision, one.precision)} {word(InstallationState, one.state)}"
        for one in agent.installations
    )


COLUMNS: list[Column] = [
    ("NAME", lambda agent: agent.name),
    ("STATE", _state),
    ("CONNECTED", lambda agent: "yes" if agent.connected else "no"),
    ("LAST SEEN (UTC)", lambda agent: when(agent.last_seen_time)),
    ("RELEASES", _serves),
    ("PINNED TO", lambda agent: ", ".join(values.short_release(pin.release) for pin in agent.pins)),
    ("LABELS", lambda agent: pairs(agent.labels)),
]


@app.command("list", epilog=example("ebbflow agent list --selector site=berlin,ring=beta"))
def list_(
    context: typer.Context,
    selector: Annotated[str, typer.Option("--selector", "-l", help='Labels such as "site=berlin".')] = "",
    limit: Limit = 0,
    output: Output = Format.TABLE,
) -> None:
    """Lists agents by name."""
    from ebbflow.api.v1.fleet_pb2 import ListAgentsRequest
    from ebbflow.client.admin import listed

    with connect(context) as client:
        items = listed(client.fleet.ListAgents, ListAgentsRequest(selector=selector), "agents", limit)
        print_list(output, items, COLUMNS)


@app.command(epilog=example("ebbflow agent show kiosk-7", "ebbflow agent show kiosk-7 -o json"))
def show(context: typer.Context, name: Name, output: Output = Format.TABLE) -> None:
    """Shows one agent: what it can run, what it serves and what it is pinned to."""
    from ebbflow.api.v1.fleet_pb2 import GetAgentRequest

    request = GetAgentRequest(name=values.full_name("agents", name))
    with connect(context) as client:
        print_one(output, client.fleet.GetAgent(request).agent)


@app.command(hidden=True, epilog=example("ebbflow agent get kiosk-7"))
def get(context: typer.Context, name: Name, output: Output = Format.TABLE) -> None:
    """The older name of `ebbflow agent show`."""
    show(context, name, output)


@app.command(epilog=example('ebbflow agent pin kiosk-7 --release faq/2 --reason "faq/3 is slow on its board"'))
def pin(
    context: typer.Context,
    name: Name,
    release: Annotated[str, typer.Option(help='Release to hold it on, such as "faq/2".')],
    reason: Annotated[str, typer.Option(help="Why, for the agent and the audit log.")],
    output: Output = Format.TABLE,
) -> None:
    """Holds an agent on one release of a student, whatever rollouts do, until it is unpinned."""
    from ebbflow.api.v1.fleet_pb2 import PinAgentRequest

    agent, held = values.full_name("agents", name), values.release_name(release)
    with connect(context) as client:
        print_one(output, client.fleet.PinAgent(PinAgentRequest(name=agent, release=held, reason=reason)).agent)


@app.command(epilog=example("ebbflow agent unpin kiosk-7 --student faq"))
def unpin(
    context: typer.Context,
    name: Name,
    student: Annotated[str, typer.Option(help='Whose release it was held on, such as "faq".')],
    output: Output = Format.TABLE,
) -> None:
    """Lets rollouts reach an agent again."""
    from ebbflow.api.v1.fleet_pb2 import UnpinAgentRequest

    request = UnpinAgentRequest(name=values.full_name("agents", name), student=values.full_name("students", student))
    with connect(context) as client:
        print_one(output, client.fleet.UnpinAgent(request).agent)


@app.command(epilog=example('ebbflow agent revoke kiosk-7 --reason "stolen"'))
def revoke(
    context: typer.Context,
    name: Name,
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")],
    yes: Yes = False,
    output: Output = Format.TABLE,
) -> None:
    """Shuts an agent out for ever; its next call is refused. Owners only."""
    from ebbflow.api.v1.fleet_pb2 import RevokeAgentRequest

    request = RevokeAgentRequest(name=values.full_name("agents", name), reason=reason)
    confirm(f"Shut {request.name} out for ever?", yes)
    with connect(context) as client:
        print_one(output, client.fleet.RevokeAgent(request).agent)


@app.command(epilog=example("ebbflow agent reinstate kiosk-7"))
def reinstate(context: typer.Context, name: Name, output: Output = Format.TABLE) -> None:
    """Lets a quarantined agent back in, after the copy of its key has been wiped."""
    from ebbflow.api.v1.fleet_pb2 import ReinstateAgentRequest

    request = ReinstateAgentRequest(name=values.full_name("agents", name))
    with connect(context) as client:
        print_one(output, client.fleet.ReinstateAgent(request).agent)


@app.command(epilog=example("ebbflow agent label kiosk-7 ring=beta site-"))
def label(
    context: typer.Context,
    name: Name,
    changes: Annotated[list[str], typer.Argument(metavar="LABELS", help="key=value sets, key- removes.")],
    output: Output = Format.TABLE,
) -> None:
    """Sets and removes labels."""
    from ebbflow.api.v1.fleet_pb2 import LabelAgentRequest

    set_, removed = values.label_changes(changes)
    request = LabelAgentRequest(name=values.full_name("agents", name), set=set_, remove=removed)
    with connect(context) as client:
        print_one(output, client.fleet.LabelAgent(request).agent)
