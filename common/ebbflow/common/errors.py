"""The one error type of Ebbflow and the catalogue of everything that can go wrong.

An error crosses every boundary as its `Reason`: over gRPC as `google.rpc.ErrorInfo.reason`, on a terminal as an exit
code, in code as `error.reason`. `docs/reference/errors.md` is generated from this catalogue.
"""

from dataclasses import dataclass
from enum import Enum, unique


@unique
class Code(Enum):
    """The gRPC status codes, by number, so that nobody needs gRPC to raise an error."""

    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


# Exit codes of both command lines; 0 is success and 2 is a wrong command line (Typer's own).
EXIT_CODES = {
    Code.INTERNAL: 1,
    Code.INVALID_ARGUMENT: 3,
    Code.NOT_FOUND: 4,
    Code.ALREADY_EXISTS: 5,
    Code.FAILED_PRECONDITION: 5,
    Code.ABORTED: 5,
    Code.UNAUTHENTICATED: 6,
    Code.PERMISSION_DENIED: 6,
    Code.UNAVAILABLE: 7,
    Code.DEADLINE_EXCEEDED: 7,
    Code.RESOURCE_EXHAUSTED: 8,
    Code.DATA_LOSS: 9,
}


@dataclass(frozen=True)
class Entry:
    """What the catalogue says of one reason."""

    code: Code
    """Status that a gRPC caller sees."""
    cure: str
    """What the reader can do about it, as a sentence."""


@unique
class Reason(Enum):
    """Everything that can go wrong, each with its status and its cure."""

    # Requests
    INVALID_REQUEST = Entry(Code.INVALID_ARGUMENT, "Correct the field that the message names.")
    PAGE_TOKEN_INVALID = Entry(Code.INVALID_ARGUMENT, "Use the next_page_token of the page before, or none.")
    INTERNAL = Entry(Code.INTERNAL, "Look for the request in the server's log; retrying may help.")
    DEADLINE_EXCEEDED = Entry(Code.DEADLINE_EXCEEDED, "Try again; if it persists, look at the server's load.")

    # Who is asking
    TOKEN_INVALID = Entry(Code.UNAUTHENTICATED, "Make a new token with `ebbflow token create` and use it unchanged.")
    TOKEN_EXPIRED = Entry(Code.UNAUTHENTICATED, "Make a new token with `ebbflow token create`.")
    TOKEN_USED_UP = Entry(Code.UNAUTHENTICATED, "Make a token with more uses: `ebbflow token create --uses N`.")
    AUTHORITY_MISMATCH = Entry(
        Code.UNAUTHENTICATED, "The token belongs to another cloud, or somebody is in between. Check the address."
    )
    CERTIFICATE_REQUIRED = Entry(Code.UNAUTHENTICATED, "Present a certificate: enrol the device or create an admin.")
    CERTIFICATE_INVALID = Entry(Code.UNAUTHENTICATED, "Enrol again: the certificate is not one of this cloud's.")
    CERTIFICATE_EXPIRED = Entry(
        Code.UNAUTHENTICATED,
        "An agent recovers by itself; an owner makes a new one with `ebbflow admin create`, the first owner with"
        " `ebbflow cloud renew-owner`.",
    )
    CERTIFICATE_REVOKED = Entry(Code.UNAUTHENTICATED, "This identity was shut out. Enrol with a new token.")
    AGENT_QUARANTINED = Entry(
        Code.PERMISSION_DENIED, "Two devices used one identity. Wipe the copy, then run `ebbflow agent reinstate`."
    )
    ROLE_INSUFFICIENT = Entry(Code.PERMISSION_DENIED, "Ask an owner for a certificate with the role that is named.")

    # Things
    STUDENT_NOT_FOUND = Entry(Code.NOT_FOUND, "`ebbflow student list` shows the students.")
    DISTILLATION_NOT_FOUND = Entry(Code.NOT_FOUND, "`ebbflow distillation list` shows the distillations.")
    RELEASE_NOT_FOUND = Entry(Code.NOT_FOUND, "`ebbflow release list` shows the releases.")
    ROLLOUT_NOT_FOUND = Entry(Code.NOT_FOUND, "`ebbflow rollout list` shows the rollouts.")
    ROUND_NOT_FOUND = Entry(Code.NOT_FOUND, "`ebbflow round list` shows the rounds.")
    POPULATION_NOT_FOUND = Entry(Code.NOT_FOUND, "`ebbflow population list` shows a student's generations.")
    AGENT_NOT_FOUND = Entry(Code.NOT_FOUND, "`ebbflow agent list` shows the agents.")
    TOKEN_NOT_FOUND = Entry(Code.NOT_FOUND, "`ebbflow token list` shows the tokens.")
    BLOB_NOT_FOUND = Entry(Code.NOT_FOUND, "Upload the file again; if a release needs it, restore the blob store.")
    METADATA_NOT_FOUND = Entry(Code.NOT_FOUND, "Ask for a metadata file that exists.")
    INTERACTION_NOT_FOUND = Entry(Code.NOT_FOUND, "Interactions are kept for a limited time; record outcomes sooner.")
    MODEL_NOT_FOUND = Entry(Code.NOT_FOUND, "GET /v1/models or GetModelStatus lists what this agent serves.")
    NO_MODEL = Entry(Code.UNAVAILABLE, "The agent has no release yet. Start a rollout, or wait for the download.")
    CONTEXT_TOO_LONG = Entry(Code.INVALID_ARGUMENT, "Shorten the prompt: GetModelStatus names the longest context.")
    API_KEY_INVALID = Entry(Code.UNAUTHENTICATED, "Send the api_key of the agent's configuration as a bearer token.")
    ALREADY_EXISTS = Entry(Code.ALREADY_EXISTS, "Choose another name.")
    REQUEST_ID_REUSED = Entry(Code.ALREADY_EXISTS, "Use a fresh request_id for a different request.")

    # States
    STATE_CONFLICT = Entry(Code.FAILED_PRECONDITION, "Look at the resource's state and choose a verb that fits it.")
    RELEASE_NOT_PUBLISHED = Entry(
        Code.FAILED_PRECONDITION, "Wait for the gate, or look why it turned the release down."
    )
    ROUND_CLOSED = Entry(Code.FAILED_PRECONDITION, "Nothing to do: the agent waits for the next round.")
    LEASE_LOST = Entry(Code.ABORTED, "Another worker has taken the job over; this one lets go of it.")
    METADATA_STALE = Entry(Code.ABORTED, "The metadata moved on; the distiller signs again by itself.")
    APPROVAL_REQUIRED = Entry(
        Code.FAILED_PRECONDITION, "Another admin than its creator runs `ebbflow rollout approve`."
    )

    # Privacy
    BATCH_REFUSED = Entry(
        Code.INVALID_ARGUMENT, "The batch breaks its plan. Update the agent; its payload was not kept."
    )
    ESCALATION_FORBIDDEN = Entry(
        Code.PERMISSION_DENIED,
        "An owner allows it: `ebbflow student escalation STUDENT --allow`; until then the student answers.",
    )
    BUDGET_EXHAUSTED = Entry(Code.RESOURCE_EXHAUSTED, "The window's budget is spent; the next window renews it.")
    LIFETIME_EXHAUSTED = Entry(
        Code.RESOURCE_EXHAUSTED,
        "The budget of all windows together is spent for good, unless its owner raises the lifetime's epsilon.",
    )
    IDENTITY_WAITS = Entry(
        Code.FAILED_PRECONDITION,
        "Wait until the day that is named, or enrol with `--new-device` if nobody used the device before.",
    )
    SIGNAL_TOO_WEAK = Entry(
        Code.FAILED_PRECONDITION,
        "Ask for votes, or fewer values (rank, modules); or have more agents, or a larger epsilon.",
    )
    PLAN_UNTRUSTED = Entry(Code.FAILED_PRECONDITION, "The plan's signature does not verify; the agent stays silent.")
    PLAN_INVALID = Entry(Code.FAILED_PRECONDITION, "The agent stays silent. Open a round whose plan is sound.")
    POLICY_TOO_WEAK = Entry(Code.FAILED_PRECONDITION, "Raise the agent's own ceiling in its configuration, or refuse.")

    # Trust and delivery
    ARTEFACT_UNTRUSTED = Entry(Code.DATA_LOSS, "The old release keeps serving. Find out who altered the bytes.")
    METADATA_EXPIRED = Entry(Code.FAILED_PRECONDITION, "The old release keeps serving. Check that the cloud re-signs.")
    RELEASE_TOO_OLD = Entry(Code.FAILED_PRECONDITION, "The signed metadata forbids releases below its min_release.")
    PROBE_FAILED = Entry(Code.FAILED_PRECONDITION, "The release does not compute here as signed; the old one serves.")
    RELEASE_REVOKED = Entry(Code.FAILED_PRECONDITION, "Choose another release: this one was taken back for ever.")
    DELTA_INVALID = Entry(Code.DATA_LOSS, "Nothing to do: the agent takes the full file instead.")
    METADATA_REFUSED = Entry(
        Code.FAILED_PRECONDITION, "Stage the metadata anew from what is published, sign it with enough keys, try again."
    )
    KEY_UNUSABLE = Entry(Code.FAILED_PRECONDITION, "Check the key's URI, its passphrase, and that its service answers.")
    OUT_OF_MEMORY = Entry(Code.RESOURCE_EXHAUSTED, "Give the agent more memory or allow a smaller precision.")

    # Load
    QUOTA_EXHAUSTED = Entry(Code.RESOURCE_EXHAUSTED, "Wait for the time that the message names, or raise the quota.")
    QUEUE_FULL = Entry(Code.RESOURCE_EXHAUSTED, "Try again a little later.")

    # This machine
    CONFIG_INVALID = Entry(Code.INVALID_ARGUMENT, "Correct the settings that the message names.")
    NOT_INITIALISED = Entry(Code.FAILED_PRECONDITION, "Run `ebbflow cloud init` first.")
    NOT_ENROLLED = Entry(Code.FAILED_PRECONDITION, "Run `ebbflow-edge enrol` with a token first.")
    ALREADY_ENROLLED = Entry(Code.FAILED_PRECONDITION, "Use `--force` to give the device a new identity.")
    AGENT_RUNNING = Entry(Code.FAILED_PRECONDITION, "Stop the other process, or use another state folder.")
    SCHEMA_OUTDATED = Entry(Code.FAILED_PRECONDITION, "Stop the servers and run `ebbflow cloud db upgrade`.")
    SCHEMA_NEWER = Entry(Code.FAILED_PRECONDITION, "The database belongs to a newer version; upgrade this software.")
    DATABASE_UNAVAILABLE = Entry(Code.UNAVAILABLE, "Start the database or correct its URL.")
    SERVER_UNAVAILABLE = Entry(Code.UNAVAILABLE, "Check the address and that `ebbflow cloud serve` is running.")
    AGENT_UNREACHABLE = Entry(Code.UNAVAILABLE, "Start the agent with `ebbflow-edge run`, or name its address.")
    AGENT_STOPPING = Entry(Code.UNAVAILABLE, "Try again when the agent runs again.")
    PORT_IN_USE = Entry(Code.UNAVAILABLE, "Stop the process that holds the port, or choose another port.")
    DISK_FULL = Entry(Code.RESOURCE_EXHAUSTED, "Free space on the disk and try again; nothing was lost.")
    FILE_CORRUPT = Entry(Code.DATA_LOSS, "Restore the file from a copy or make it again.")
    CHECKPOINT_UNREADABLE = Entry(Code.INVALID_ARGUMENT, "Point to a folder that transformers can load.")
    CORPUS_INVALID = Entry(Code.INVALID_ARGUMENT, "Every line must be JSON with the fields 'topic' and 'text'.")
    WEIGHTS_INVALID = Entry(
        Code.INVALID_ARGUMENT,
        "The training diverged or the checkpoint is damaged: lower the learning rate, or begin anew.",
    )
    TEACHER_MISMATCH = Entry(Code.INVALID_ARGUMENT, "Teacher and student need the same tokenizer.")
    TRAINING_DIVERGED = Entry(Code.FAILED_PRECONDITION, "Start again with a lower learning rate or more warm-up steps.")
    EXTRA_MISSING = Entry(Code.FAILED_PRECONDITION, "Install the extra that the message names.")


class EbbflowError(Exception):
    """What every part of Ebbflow raises when it knows what went wrong.

    Attributes:
        reason: the catalogue entry; compare with `is`.
        metadata: facts by name, as strings; safe to show to the caller.
    """

    def __init__(self, reason: Reason, message: str, **metadata: object) -> None:
        """Says what went wrong in one sentence that names the thing; the cure comes from the catalogue."""
        super().__init__(message)
        self.reason = reason
        self.metadata = {key: str(value) for key, value in metadata.items()}

    @property
    def code(self) -> Code:
        """The gRPC status."""
        return self.reason.value.code

    @property
    def cure(self) -> str:
        """What to do about it."""
        return self.reason.value.cure

    @property
    def exit_code(self) -> int:
        """The exit code of a command that ends with it."""
        return EXIT_CODES[self.code]
