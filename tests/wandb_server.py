"""A W&B server for tests, on loopback only: the unmodified client (0.31) logs to it as if online.

Modelled: runs (start, resume, file stream, files, the stop button), artifacts (types, versions,
deduplication by digest, aliases, links to portfolios and to the registry, deletion), the public
API's reading of both, sweeps (grid; random and bayes draw at random) and faults. GraphQL documents
are parsed and resolved field by field. All that the client sends without being modelled here (an
operation, a field, an argument, a path) is answered with an error and kept in `unknown`, for which
`check` fails: nothing passes by accident.

Not modelled: users and rights beyond one key and one entity, multipart uploads (files of 2 GiB and
more), incremental manifests, parquet exports of the history, fork and rewind, early termination of
sweeps, launch, reports, automations, alerts, lists of registries, expiry of artifacts, and runs
that turn "crashed" when their heartbeats cease.
"""

import base64
import contextlib
import fnmatch
import hashlib
import itertools
import json
import math
import random
import re
import secrets
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Self, TypeVar
from urllib.parse import quote, unquote, urlsplit

import yaml  # a sweep's configuration comes as YAML; the client itself depends on this package
from graphql_documents import (
    Document,
    Execution,
    Node,
    Unknown,
    call,
    connection,
    ignoring,
    paged,
    taken,
)

ENTITY = "team"
ENTITIES = (ENTITY, "other-team")
ORGANIZATION, ORGANIZATION_ENTITY = "organization", "organization-entity"
REGISTRIES = ("wandb-registry-model", "wandb-registry-dataset")
PROJECT = "uncategorized"
SLOW_SECONDS = 0.5  # that an answer takes where answers are slow
FEATURES = (
    "ARTIFACT_COLLECTION_MEMBERSHIP_FILES",
    "ARTIFACT_COLLECTION_MEMBERSHIP_FILE_DOWNLOAD_HANDLER",
    "ARTIFACT_MEMBERSHIP_IN_LINK_ARTIFACT_RESPONSE",
    "ARTIFACT_TAGS",
    "PROJECT_ARTIFACT_COLLECTION_MEMBERSHIP",
    "TOTAL_COUNT_IN_FILE_CONNECTION",
    "USE_ARTIFACT_WITH_ENTITY_AND_PROJECT_INFORMATION",
)
SUMMARIES = {1: "min", 2: "max", 3: "mean", 4: "best", 5: "last", 6: "none", 7: "copy", 8: "first"}
GOALS = {0: "", 1: "minimize", 2: "maximize"}
RUN_INPUTS = {
    "commit": "commit",
    "config": "raw_config",
    "description": "description",
    "displayName": "name",
    "groupName": "group",
    "host": "host",
    "jobProgram": "program",
    "jobRepo": "remote",
    "jobType": "job_type",
    "notes": "notes",
    "state": "state",
    "summaryMetrics": "summary",
    "sweep": "sweep",
    "tags": "tags",
}


class Refused(Exception):
    """The client asked for what W&B denies or does not have."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


# What the server keeps


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def text(value: Any) -> str:
    return json.dumps(value)


def identifier(*parts: Any) -> str:
    """An id of GraphQL, which the client needs to be base64."""
    return base64.b64encode(":".join(map(str, parts)).encode()).decode()


@dataclass
class Metric:
    """What `define_metric` said of a metric, or of all that match a glob."""

    name: str
    glob: bool
    step: str
    step_sync: bool
    hidden: bool
    summary: list[str]
    goal: str


@dataclass(eq=False)
class Run:
    node: str
    entity: str
    project: str
    id: str
    name: str
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    notes: str = ""
    description: str = ""
    state: str = "running"
    exit_code: int | None = None
    program: str = ""
    host: str = ""
    commit: str = ""
    remote: str = ""
    sweep: str = ""
    raw_config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    used: "list[Artifact]" = field(default_factory=list)
    logged: "list[Artifact]" = field(default_factory=list)
    preempting: bool = False
    stopping: bool = False
    created: str = field(default_factory=now)
    heartbeat: str = field(default_factory=now)

    @property
    def config(self) -> dict[str, Any]:
        return {key: item["value"] for key, item in self.raw_config.items() if key != "_wandb"}

    @property
    def internal(self) -> dict[str, Any]:
        """What the client keeps for itself in the configuration."""
        kept: dict[str, Any] = self.raw_config.get("_wandb", {}).get("value", {})
        return kept

    @property
    def metrics(self) -> dict[str, Metric]:
        """The defined metrics, which the configuration holds under the protocol's field numbers."""
        defined: list[dict[str, Any]] = self.internal.get("m", [])
        metrics = {}
        for item in defined:
            name, step, options = item.get("1") or item["2"], item.get("4", ""), item.get("6", [])
            if "5" in item:
                step = defined[item["5"] - 1]["1"]
            summary = [SUMMARIES[number] for number in item.get("7", [])]
            goal = GOALS[item.get("8", 0)]
            metrics[name] = Metric(
                name, "2" in item, step, 1 in options, 2 in options, summary, goal
            )
        return metrics

    def rows(self, low: float, high: float) -> list[dict[str, Any]]:
        """The history from one step to before another."""
        return [row for row in self.history if low <= row["_step"] < high]

    @property
    def output(self) -> str:
        """The console's text, without the stamps of its lines."""
        stamp = re.compile(r"(ERROR )?\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+ ")
        return "\n".join(stamp.sub("", line, count=1) for line in self.lines)


@dataclass(eq=False)
class Artifact:
    node: str
    collection: "Collection" = field(repr=False)
    digest: str
    blobs: dict[str, bytes] = field(repr=False)
    creator: Run | None = field(repr=False)
    description: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    wanted: list[str] = field(default_factory=list)  # the aliases to set at the commit
    history_step: int | None = None
    state: str = "PENDING"
    index: int | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    users: list[Run] = field(default_factory=list, repr=False)
    created: str = field(default_factory=now)

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """The manifest's entries by path: digest, size and, of a reference, its `ref`."""
        entries: dict[str, dict[str, Any]] = self.manifest.get("contents", {})
        return entries

    @property
    def size(self) -> int:
        return sum(entry.get("size", 0) for entry in self.entries.values())

    @property
    def files(self) -> dict[str, bytes]:
        """The contents by path, of what is no reference."""
        return {
            path: self.blobs[hexadecimal(e["digest"])]
            for path, e in self.entries.items()
            if "ref" not in e
        }


@dataclass(eq=False)
class Member:
    """A version in a collection: its own, or one that it is linked to."""

    node: str
    collection: "Collection" = field(repr=False)
    artifact: Artifact
    index: int
    aliases: list[str] = field(default_factory=list)
    created: str = field(default_factory=now)


@dataclass(eq=False)
class Collection:
    node: str
    entity: str
    project: str
    name: str
    type: str
    portfolio: bool
    members: list[Member] = field(default_factory=list)
    size: int = 0  # with deleted versions, whose numbers do not come back
    created: str = field(default_factory=now)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.entity, self.project, self.name

    def member(self, alias: str) -> Member | None:
        return next(
            (member for member in self.members if alias in (f"v{member.index}", *member.aliases)),
            None,
        )

    def point(self, member: Member, alias: str) -> None:
        """Moves an alias to a version."""
        for other in self.members:
            other.aliases = [kept for kept in other.aliases if kept != alias]
        member.aliases.append(alias)

    def added(self, artifact: Artifact, state: "State") -> Member:
        """An artifact's version here, made if need be and the latest from now on."""
        member = next((member for member in self.members if member.artifact is artifact), None)
        if member is None:
            member = state.new(Member, self, artifact, self.size)
            self.members.append(member)
            self.size += 1
        self.point(member, "latest")
        return member


@dataclass(eq=False)
class Sweep:
    node: str
    entity: str
    project: str
    id: str
    text: str = ""  # YAML
    name: str | None = None
    state: str = "PENDING"
    runs: list[str] = field(default_factory=list)  # the ids given to agents
    config: dict[str, Any] = field(default_factory=dict)
    draws: Iterator[dict[str, Any]] = field(default_factory=lambda: iter(()))
    created: str = field(default_factory=now)

    def configure(self, text: str) -> None:
        self.text, self.config = text, yaml.safe_load(text)
        self.draws = draws(self.config)

    @property
    def expected(self) -> int | None:
        """How many runs there will be, where that is known."""
        if self.config["method"] == "grid":
            return len(list(draws(self.config)))
        cap: int | None = self.config.get("run_cap")
        return cap

    def commands(self, running: dict[str, bool]) -> list[dict[str, Any]]:
        """What an agent is to do: one run at a time; `exit` only if none runs, as it kills them."""
        if running:
            return [{"type": "stop", "run_id": run} for run in running if self.state == "CANCELED"]
        if self.state == "PAUSED":
            return []
        draw = None if self.state in ("CANCELED", "FINISHED") else next(self.draws, None)
        if draw is None:
            if self.state != "CANCELED":
                self.state = "FINISHED"
            return [{"type": "exit"}]
        self.state, run = "RUNNING", secrets.token_hex(4)
        self.runs.append(run)
        arguments = {name: {"value": value} for name, value in draw.items()}
        return [
            {"type": "run", "run_id": run, "program": self.config.get("program"), "args": arguments}
        ]


@dataclass(eq=False)
class Agent:
    node: str
    sweep: Sweep


Kept = TypeVar("Kept", Run, Artifact, Member, Collection, Sweep, Agent)


def draws(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A sweep's parameters, one draw for each run."""
    parameters, runs = config.get("parameters", {}), config.get("run_cap")
    if config["method"] == "grid":
        values = [
            one["values"] if "values" in one else [one["value"]] for one in parameters.values()
        ]
        combinations = (
            dict(zip(parameters, chosen, strict=True)) for chosen in itertools.product(*values)
        )
    else:
        combinations = (
            {name: drawn(one) for name, one in parameters.items()} for _ in itertools.count()
        )
    return itertools.islice(combinations, runs)


def drawn(parameter: dict[str, Any]) -> Any:
    if "value" in parameter:
        return parameter["value"]
    if "values" in parameter:
        return random.choice(parameter["values"])
    low: Any = parameter.get("min")
    high: Any = parameter.get("max")
    distribution = parameter.get("distribution")
    if distribution == "int_uniform":
        return random.randint(low, high)
    if distribution == "uniform":
        return random.uniform(low, high)
    if distribution == "log_uniform_values":
        return math.exp(random.uniform(math.log(low), math.log(high)))
    raise Unknown(f"a sweep's distribution {distribution}")


def hexadecimal(digest: str) -> str:
    """A manifest's base64 digest as W&B's storage names its content."""
    return base64.b64decode(digest).hex()


class State:
    """All that the server was told."""

    def __init__(self) -> None:
        self.projects: dict[tuple[str, str], int] = {}
        self.runs: dict[tuple[str, str, str], Run] = {}
        self.collections: dict[tuple[str, str, str], Collection] = {}
        self.sweeps: dict[str, Sweep] = {}
        self.artifacts: list[Artifact] = []
        self.blobs: dict[str, bytes] = {}
        self.denied: set[str] = set()  # names of collections and projects
        self._nodes: dict[str, Any] = {}

    def new(self, kind: type[Kept], *values: Any) -> Kept:
        """An object with an id."""
        node = identifier(kind.__name__, len(self._nodes))
        made = self._nodes[node] = kind(node, *values)
        return made

    def get(self, kind: type[Kept], node: str) -> Kept:
        found = self._nodes.get(node)
        if not isinstance(found, kind):
            raise Refused(404, f"{kind.__name__} {node} not found")
        return found

    def project(self, entity: str | None, project: str | None) -> tuple[str, str]:
        """A project's key, the project created on the fly."""
        key = (entity or ENTITY, project or PROJECT)
        self.allow(key[1])
        if key[0] not in ENTITIES and (key[0] != ORGANIZATION_ENTITY or key[1] not in REGISTRIES):
            raise Refused(404, f"entity {key[0]} or its project {key[1]} not found")
        self.projects.setdefault(key, len(self.projects) + 1)
        return key

    def run(self, entity: str | None, project: str | None, id: str) -> Run:
        run = self.runs.get((entity or ENTITY, project or PROJECT, id))
        if run is None:
            raise Refused(404, f"run {entity}/{project}/{id} not found")
        return run

    def allow(self, collection: str) -> None:
        if collection in self.denied:
            raise Refused(403, "permission denied")

    def collection(self, key: tuple[str, str], name: str, type: str, portfolio: bool) -> Collection:
        self.allow(name)
        collection = self.collections.get((*key, name))
        if collection is None:
            collection = self.collections[*key, name] = self.new(
                Collection, *key, name, type, portfolio
            )
        if (collection.type, collection.portfolio) != (type, portfolio):
            raise Refused(409, f"collection {name} is of type {collection.type}")
        return collection

    def version(self, collection: Collection, digest: str) -> Artifact | None:
        """The version with this content."""
        same = (
            one for one in self.artifacts if (one.collection, one.digest) == (collection, digest)
        )
        return next((one for one in same if one.state != "DELETED"), None)

    def commit(self, artifact: Artifact) -> None:
        member = artifact.collection.added(artifact, self)
        artifact.index, artifact.state = member.index, "COMMITTED"
        for alias in artifact.wanted:
            artifact.collection.point(member, alias)
        artifact.wanted.clear()


# How GraphQL sees it


ATTRIBUTES = {
    "name": "id",
    "display_name": "name",
    "created_at": "created",
    "heartbeat_at": "heartbeat",
}
ATTRIBUTES |= {
    "displayName": "name",
    "createdAt": "created",
    "jobType": "job_type",
    "versionIndex": "index",
}
ATTRIBUTES |= {name: name for name in ("state", "group", "job_type", "sweep", "tags")}


def value_of(item: Run | Artifact, key: str) -> Any:
    """What a filter or an order calls by this key, of a run or a version."""
    section, _, name = key.partition(".")
    if isinstance(item, Run) and section in ("config", "summary_metrics"):
        values = item.config if section == "config" else item.summary
        return values.get(name.removesuffix(".value"))
    if not hasattr(item, ATTRIBUTES.get(key, "")):
        raise Unknown(f"filter or order by {key}")
    return getattr(item, ATTRIBUTES[key])


COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": lambda value, wanted: value == wanted or (isinstance(value, list) and wanted in value),
    "$ne": lambda value, wanted: not COMPARISONS["$eq"](value, wanted),
    "$in": lambda value, wanted: any(COMPARISONS["$eq"](value, one) for one in wanted),
    "$nin": lambda value, wanted: not COMPARISONS["$in"](value, wanted),
    "$gt": lambda value, wanted: value is not None and value > wanted,
    "$gte": lambda value, wanted: value is not None and value >= wanted,
    "$lt": lambda value, wanted: value is not None and value < wanted,
    "$lte": lambda value, wanted: value is not None and value <= wanted,
    "$exists": lambda value, wanted: (value is not None) is wanted,
    "$regex": lambda value, wanted: isinstance(value, str) and re.search(wanted, value) is not None,
}


def matches(item: Run | Artifact, filters: dict[str, Any]) -> bool:
    """Whether a filter, in the words of MongoDB, takes a run or a version."""
    for key, wanted in filters.items():
        if key in ("$and", "$or"):
            if not (all if key == "$and" else any)(matches(item, one) for one in wanted):
                return False
            continue
        comparisons = wanted if isinstance(wanted, dict) else {"$eq": wanted}
        if unknown := comparisons.keys() - COMPARISONS.keys():
            raise Unknown(f"filter {unknown}")
        if not all(
            COMPARISONS[name](value_of(item, key), operand) for name, operand in comparisons.items()
        ):
            return False
    return True


def selected(items: list[Any], filters: str, order: str = "") -> list[Any]:
    """Return the items that a filter takes, in order; last those without the value to order by."""
    chosen = [item for item in items if matches(item, json.loads(filters))]
    if not order:
        return chosen
    descending, key = order.startswith("-"), order.lstrip("+-")
    there = [item for item in chosen if value_of(item, key) is not None]
    there.sort(key=lambda item: value_of(item, key), reverse=descending)
    return there + [item for item in chosen if value_of(item, key) is None]


def optional(node: Callable[[Kept], Node], found: Kept | None) -> Node | None:
    return None if found is None else node(found)


def sampled(rows: list[dict[str, Any]], samples: int) -> list[dict[str, Any]]:
    """At most so many of the rows, evenly spaced."""
    return (
        rows if len(rows) <= samples else [rows[i * len(rows) // samples] for i in range(samples)]
    )


class Nodes:
    """The nodes of what the server keeps."""

    def __init__(self, state: State, url: str) -> None:
        self.state, self.url = state, url

    def _user(self) -> Node:
        return Node(
            "User",
            id=identifier("User", 1),
            name="Test User",
            username="tester",
            email="tester@example.com",
            entity=ENTITY,
            admin=False,
            flags="{}",
            deletedAt=None,
            apiKeys=connection([]),
            teams=lambda: connection([self._entity(ENTITY)]),
        )

    def _entity(self, name: str) -> Node:
        organization = Node(
            "Organization",
            name=ORGANIZATION,
            orgEntity=lambda: self._entity(ORGANIZATION_ENTITY),
            coreWeaveOrganizationId=None,
        )
        return Node(
            "Entity", id=identifier("Entity", name), name=name, user=None, organization=organization
        )

    def _project(self, entity: str, name: str) -> Node:
        key, state = (entity, name), self.state
        runs = [run for run in state.runs.values() if (run.entity, run.project) == key]
        collections = [
            one for one in state.collections.values() if (one.entity, one.project) == key
        ]

        def collection(name: str) -> Node | None:
            return optional(self._collection, state.collections.get((*key, name)))

        def of_type(name: str) -> Node | None:
            these = {one.name: one for one in collections if one.type == name}
            artifact_type = Node(
                "ArtifactType",
                id=identifier("ArtifactType", name),
                name=name,
                description=None,
                createdAt=now(),
                artifactCollection=lambda name: optional(self._collection, these.get(name)),
                artifactCollections=paged(
                    lambda: [self._collection(one) for one in these.values()]
                ),
            )
            return artifact_type if these else None

        def member(name: str) -> Member | None:
            collection, _, alias = name.partition(":")
            found = state.collections.get((*key, collection))
            return found.member(alias or "latest") if found else None

        def sweep(sweepName: str) -> Node | None:
            found = state.sweeps.get(sweepName)
            return self._sweep(found) if found and (found.entity, found.project) == key else None

        def run(name: str, missingOk: bool = False) -> Node | None:
            return optional(self._run, state.runs.get((*key, name)))

        return Node(
            "Project",
            id=identifier("Project", *key),
            internalId=identifier("ProjectInternalId", state.projects[key]),
            name=name,
            entityName=entity,
            createdAt=now(),
            isBenchmark=False,
            readOnly=False,
            entity=lambda: self._entity(entity),
            user=self._user,
            run=run,
            bucket=run,
            runCount=lambda filters="{}": len(selected(runs, filters)),
            runs=lambda filters="{}", order="", first=None, after=None: connection(
                [self._run(run) for run in selected(runs, filters, order)], first, after
            ),
            sweep=sweep,
            artifact=lambda name: optional(
                lambda found: self._artifact(found.artifact), member(name)
            ),
            artifactType=of_type,
            artifactTypes=paged(
                lambda: [of_type(type) for type in sorted({one.type for one in collections})]
            ),
            artifactCollection=collection,
            artifactCollections=paged(lambda: [self._collection(one) for one in collections]),
            artifactCollectionMembership=lambda name: optional(self._member, member(name)),
        )

    def _run(self, run: Run) -> Node:
        def history(
            samples: int = sys.maxsize, minStep: int = 0, maxStep: float = math.inf
        ) -> list[str]:
            return [text(row) for row in sampled(run.rows(minStep, maxStep), samples)]

        def sampled_history(specs: str | list[str]) -> list[list[dict[str, Any]]]:
            each = [specs] if isinstance(specs, str) else specs
            return [call("sampledHistory", series, json.loads(spec)) for spec in each]

        def series(
            keys: Sequence[str] = (),
            samples: int = 500,
            minStep: int = 0,
            maxStep: float = math.inf,
        ) -> list[Any]:
            rows = [row for row in run.rows(minStep, maxStep + 1) if row.keys() >= set(keys)]
            return sampled([{key: row[key] for key in keys or row} for row in rows], samples)

        def files(
            names: Sequence[str] = (),
            pattern: str = "%",
            first: int | None = None,
            after: str | None = None,
        ) -> Node:
            chosen = fnmatch.filter(run.files, pattern.replace("%", "*").replace("_", "?"))
            nodes = [self._file(name, run.files[name], self._run_url(run, name)) for name in chosen]
            return connection(
                [node for node in nodes if not names or node.fields["name"] in names], first, after
            )

        def artifacts(artifacts: list[Artifact]) -> Callable[..., Node]:
            return paged(
                lambda: [
                    self._artifact(artifact)
                    for artifact in artifacts
                    if artifact.state == "COMMITTED"
                ]
            )

        names = "id=node name=id displayName=name description notes tags group jobType=job_type"
        names += " commit state"
        return Node(
            "Run",
            **taken(run, f"{names} exitcode=exit_code stopped=stopping shouldStop=stopping"),
            **taken(run, "createdAt=created heartbeatAt=heartbeat"),
            running=run.state == "running",
            failed=run.state == "failed",
            readOnly=False,
            sweepName=run.sweep or None,
            user=self._user,
            project=lambda: self._project(run.entity, run.project),
            projectId=self.state.projects[run.entity, run.project],
            config=text(run.raw_config),
            wandbConfig=lambda keys: text(
                {key: run.internal[key] for key in keys if key in run.internal}
            ),
            summaryMetrics=text(run.summary),
            systemMetrics=text(run.events[-1] if run.events else {}),
            historyKeys={
                "lastStep": max((row["_step"] for row in run.history), default=-1),
                "keys": {key: {} for row in run.history for key in row},
            },
            historyLineCount=len(run.history),
            eventsLineCount=len(run.events),
            logLineCount=len(run.lines),
            historyTail=text([text(row) for row in run.history[-1:]]),
            eventsTail=text([text(row) for row in run.events[-1:]]),
            history=history,
            events=lambda samples=500: [text(row) for row in sampled(run.events, samples)],
            sampledHistory=sampled_history,
            parquetHistory=lambda liveKeys: Node("ParquetHistory", parquetUrls=[], liveData=[]),
            fileCount=len(run.files),
            files=files,
            inputArtifacts=artifacts(run.used),
            outputArtifacts=artifacts(run.logged),
        )

    def _run_url(self, run: Run, name: str) -> str:
        return f"{self.url}/storage/run/{quote(f'{run.entity}/{run.project}/{run.id}/{name}')}"

    def _file(self, name: str, content: bytes, url: str) -> Node:
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        return Node(
            "File",
            id=identifier("File", url),
            name=name,
            displayName=name,
            digest=digest,
            md5=digest,
            directUrl=url,
            storagePath=urlsplit(url).path,
            sizeBytes=len(content),
            updatedAt=None,
            mimetype="application/octet-stream",
            url=lambda upload=False: url,
        )

    def _collection(self, collection: Collection) -> Node:
        def artifacts(
            filters: str = "{}", order: str = "", first: int | None = None, after: str | None = None
        ) -> Node:
            numbers = {member.artifact.node: f"v{member.index}" for member in collection.members}
            chosen = selected(
                [member.artifact for member in reversed(collection.members)], filters, order
            )
            nodes = [self._artifact(artifact) for artifact in chosen]
            return connection(
                nodes, first, after, version=[numbers[artifact.node] for artifact in chosen]
            )

        aliases = [(member, alias) for member in collection.members for alias in member.aliases]
        return Node(
            "ArtifactPortfolio" if collection.portfolio else "ArtifactSequence",
            **taken(collection, "id=node name createdAt=created updatedAt=created"),
            description=None,
            project=lambda: self._project(collection.entity, collection.project),
            defaultArtifactType=Node("ArtifactType", name=collection.type),
            tags=connection([]),
            aliases=paged(lambda: [self._alias(member, alias) for member, alias in aliases]),
            artifactMembership=lambda aliasName: optional(
                self._member, collection.member(aliasName)
            ),
            artifacts=artifacts,
            latestArtifact=lambda: optional(
                lambda found: self._artifact(found.artifact), collection.member("latest")
            ),
        )

    def _alias(self, member: Member, alias: str) -> Node:
        return Node(
            "ArtifactAlias",
            id=identifier("ArtifactAlias", member.node, alias),
            alias=alias,
            artifactCollection=lambda: self._collection(member.collection),
        )

    def _member(self, member: Member) -> Node:
        self.state.allow(member.collection.name)

        def files(
            names: Sequence[str] = (), first: int | None = None, after: str | None = None
        ) -> Node:
            nodes = [
                self._file(
                    path, content, self._blob_url(member.artifact.entries[path]["digest"], path)
                )
                for path, content in member.artifact.files.items()
                if not names or path in names
            ]
            return connection(nodes, first, after)

        return Node(
            "ArtifactCollectionMembership",
            **taken(member, "id=node versionIndex=index createdAt=created"),
            aliases=lambda: [self._alias(member, alias) for alias in member.aliases],
            artifactCollection=lambda: self._collection(member.collection),
            artifact=self._artifact(member.artifact),
            files=files,
        )

    def _members(self, artifact: Artifact) -> list[Member]:
        return [
            m
            for one in self.state.collections.values()
            for m in one.members
            if m.artifact is artifact
        ]

    def _artifact(self, artifact: Artifact) -> Node:
        self.state.allow(artifact.collection.name)
        members = self._members(artifact)
        return Node(
            "Artifact",
            **taken(
                artifact,
                "id=node versionIndex=index description historyStep=history_step state size digest",
            ),
            **taken(artifact, "createdAt=created updatedAt=created commitHash=digest"),
            ttlDurationSeconds=-1,
            ttlIsInherited=True,
            fileCount=len(artifact.entries),
            artifactSequence=lambda: self._collection(artifact.collection),
            artifactType=Node("ArtifactType", name=artifact.collection.type),
            metadata=text(artifact.metadata),
            tags=[Node("Tag", id=identifier("Tag", tag), name=tag) for tag in artifact.tags],
            aliases=lambda: [
                self._alias(member, alias) for member in members for alias in member.aliases
            ],
            artifactMemberships=lambda: connection([self._member(member) for member in members]),
            currentManifest=lambda: self._manifest(artifact),
            createdBy=lambda: optional(self._run, artifact.creator),
            usedBy=lambda: connection([self._run(run) for run in artifact.users]),
        )

    def _manifest(self, artifact: Artifact) -> Node:
        url = f"{self.url}/storage/manifest/{quote(artifact.node)}"
        file = Node("File", id=artifact.node, directUrl=url, uploadUrl=url, uploadHeaders=[])
        return Node("ArtifactManifest", id=artifact.node, file=file)

    def _blob_url(self, digest: str, path: str) -> str:
        return f"{self.url}/storage/blob/{hexadecimal(digest)}/{quote(path)}"

    def _sweep(self, sweep: Sweep) -> Node:
        runs = [run for run in self.state.runs.values() if run.sweep == sweep.id]
        return Node(
            "Sweep",
            **taken(
                sweep,
                "id=node name=id displayName=name state config=text"
                " createdAt=created updatedAt=created",
            ),
            bestLoss=None,
            heartbeatAt=None,
            controller=None,
            scheduler=None,
            method=sweep.config["method"],
            description=sweep.config.get("description"),
            earlyStopJobRunning=False,
            runCount=len(runs),
            runCountExpected=sweep.expected,
            project=lambda: self._project(sweep.entity, sweep.project),
            runs=paged(lambda: [self._run(run) for run in runs]),
        )


class Queries(Nodes):
    """The fields of the type Query."""

    def viewer(self) -> Node:
        return self._user()

    def serverInfo(self) -> Node:
        return Node(
            "ServerInfo", features=[Node("Feature", name=name, isEnabled=True) for name in FEATURES]
        )

    def project(self, name: str = "", entityName: str = "") -> Node | None:
        key = (entityName or ENTITY, name or PROJECT)
        return self._project(*key) if key in self.state.projects else None

    model = project

    def models(
        self, entityName: str = ENTITY, first: int | None = None, after: str | None = None
    ) -> Node:
        return connection(
            [self._project(*key) for key in self.state.projects if key[0] == entityName],
            first,
            after,
        )

    def entity(self, name: str) -> Node | None:
        return self._entity(name) if name in (ENTITY, ORGANIZATION_ENTITY) else None

    def artifact(self, id: str) -> Node:
        return self._artifact(self.state.get(Artifact, id))

    def artifactCollection(self, id: str) -> Node:
        return self._collection(self.state.get(Collection, id))


class Mutations(Nodes):
    """The fields of the type Mutation, each with the members of its input as arguments."""

    def upsertBucket(
        self, id: str = "", name: str = "", entityName: str = "", modelName: str = "", **values: Any
    ) -> Node:
        inserted = False
        if id:
            run = self.state.get(Run, id)
        else:
            key, name = self.state.project(entityName, modelName), name or secrets.token_hex(4)
            inserted = (*key, name) not in self.state.runs
            if inserted:
                title = f"run-{len(self.state.runs) + 1}"
                self.state.runs[*key, name] = self.state.new(Run, *key, name, title)
            run = self.state.runs[*key, name]
            run.preempting = run.preempting and run.exit_code is None
            run.state, run.exit_code = "preempting" if run.preempting else "running", None
        for given, value in values.items():
            if given not in RUN_INPUTS:
                raise Unknown(f"upsertBucket: {given}")
            setattr(
                run,
                RUN_INPUTS[given],
                json.loads(value) if given in ("config", "summaryMetrics") else value,
            )
        node = self._run(run)
        # With a number the client would resume there, although it was not asked to.
        node.fields["historyLineCount"] = None
        return Node("UpsertBucketPayload", bucket=node, inserted=inserted)

    def createRunFiles(
        self, entityName: str, projectName: str, runName: str, files: list[str]
    ) -> Node:
        run = self.state.run(entityName, projectName, runName)
        nodes = [Node("File", name=name, uploadUrl=self._run_url(run, name)) for name in files]
        return Node("CreateRunFilesPayload", runID=run.node, uploadHeaders=[], files=nodes)

    def stopRun(self, id: str) -> Node:
        self.state.get(Run, id).stopping = True
        return Node("StopRunPayload", success=True)

    @ignoring("clientID", "sequenceClientID", "digestAlgorithm")
    def createArtifact(  # noqa: PLR0913  # the names are those of the fields of the API's input
        self,
        artifactTypeName: str,
        digest: str,
        artifactCollectionName: str = "",
        artifactCollectionNames: Sequence[str] = (),
        entityName: str = "",
        projectName: str = "",
        runName: str = "",
        description: str | None = None,
        metadata: str = "{}",
        aliases: Sequence[dict[str, str]] = (),
        tags: Sequence[dict[str, str]] = (),
        historyStep: int | None = None,
        enableDigestDeduplication: bool = False,
    ) -> Node:
        key = self.state.project(entityName, projectName)
        (name,) = artifactCollectionNames or [artifactCollectionName]
        collection = self.state.collection(key, name, artifactTypeName, portfolio=False)
        creator = self.state.run(*key, runName) if runName else None
        artifact = self.state.version(collection, digest) if enableDigestDeduplication else None
        if artifact is None:
            artifact = self.state.new(
                Artifact, collection, digest, self.state.blobs, creator, description
            )
            artifact.metadata, artifact.history_step = json.loads(metadata), historyStep
            self.state.artifacts.append(artifact)
        artifact.tags += [tag["tagName"] for tag in tags if tag["tagName"] not in artifact.tags]
        artifact.wanted += [
            one["alias"] for one in aliases if one["artifactCollectionName"] == name
        ]
        if creator and artifact not in creator.logged:
            creator.logged.append(artifact)
        if artifact.state == "COMMITTED":
            self.state.commit(artifact)
        return Node("CreateArtifactPayload", artifact=self._artifact(artifact))

    @ignoring("digest", "entityName", "projectName", "runName", "baseArtifactID")
    def createArtifactManifest(self, artifactID: str, name: str, type: str) -> Node:
        if (name, type) != ("wandb_manifest.json", "FULL"):
            raise Unknown(f"manifest {name} of type {type}")
        manifest = self._manifest(self.state.get(Artifact, artifactID))
        return Node("CreateArtifactManifestPayload", artifactManifest=manifest)

    def createArtifactFiles(self, artifactFiles: list[dict[str, Any]], storageLayout: str) -> Node:
        if storageLayout != "V2":
            raise Unknown(f"storage layout {storageLayout}")
        nodes = [call("createArtifactFiles", self._artifact_file, one) for one in artifactFiles]
        return Node("CreateArtifactFilesPayload", files=connection(nodes))

    @ignoring("artifactManifestID", "mimetype")
    def _artifact_file(self, artifactID: str, name: str, md5: str) -> Node:
        url = self._blob_url(md5, name)
        return Node(
            "File",
            storagePath=urlsplit(url).path,
            uploadUrl=None if hexadecimal(md5) in self.state.blobs else url,
            uploadHeaders=[],
            uploadMultipartUrls=None,
            artifact=self._artifact(self.state.get(Artifact, artifactID)),
        )

    def commitArtifact(self, artifactID: str) -> Node:
        artifact = self.state.get(Artifact, artifactID)
        digests = [
            hexadecimal(entry["digest"])
            for entry in artifact.entries.values()
            if "ref" not in entry
        ]
        if not artifact.manifest or not self.state.blobs.keys() >= set(digests):
            raise Refused(400, f"artifact {artifact.collection.name} is not wholly uploaded")
        self.state.commit(artifact)
        return Node("CommitArtifactPayload", artifact=self._artifact(artifact))

    @ignoring("usedAs", "artifactEntityName", "artifactProjectName")
    def useArtifact(self, artifactID: str, entityName: str, projectName: str, runName: str) -> Node:
        artifact, run = (
            self.state.get(Artifact, artifactID),
            self.state.run(entityName, projectName, runName),
        )
        node = self._artifact(artifact)
        if artifact not in run.used:
            run.used.append(artifact)
            artifact.users.append(run)
        return Node("UseArtifactPayload", artifact=node)

    def updateArtifact(
        self,
        artifactID: str,
        description: str | None = None,
        metadata: str | None = None,
        tagsToAdd: Sequence[dict[str, str]] = (),
        tagsToDelete: Sequence[dict[str, str]] = (),
    ) -> Node:
        artifact = self.state.get(Artifact, artifactID)
        artifact.description = artifact.description if description is None else description
        artifact.metadata = artifact.metadata if metadata is None else json.loads(metadata)
        changed = {tag["tagName"] for tag in [*tagsToAdd, *tagsToDelete]}
        artifact.tags = [tag for tag in artifact.tags if tag not in changed] + [
            tag["tagName"] for tag in tagsToAdd
        ]
        return Node("UpdateArtifactPayload", artifact=self._artifact(artifact))

    def _named(
        self, artifactID: str, aliases: list[dict[str, str]]
    ) -> Iterator[tuple[Member, str]]:
        """A version's memberships and the aliases they are to get or lose."""
        members = {m.collection.key: m for m in self._members(self.state.get(Artifact, artifactID))}
        for one in aliases:
            key = (one["entityName"], one["projectName"], one["artifactCollectionName"])
            if key not in members:
                raise Refused(404, f"the artifact is not in {key}")
            yield members[key], one["alias"]

    def addAliases(self, artifactID: str, aliases: list[dict[str, str]]) -> Node:
        for member, alias in self._named(artifactID, aliases):
            member.collection.point(member, alias)
        return Node("AddAliasesPayload", success=True)

    def deleteAliases(self, artifactID: str, aliases: list[dict[str, str]]) -> Node:
        for member, alias in self._named(artifactID, aliases):
            member.aliases = [kept for kept in member.aliases if kept != alias]
        return Node("DeleteAliasesPayload", success=True)

    def deleteArtifact(self, artifactID: str, deleteAliases: bool = False) -> Node:
        artifact = self.state.get(Artifact, artifactID)
        node, members = self._artifact(artifact), self._members(artifact)
        if not deleteAliases and any(member.aliases for member in members):
            raise Refused(400, "cannot delete an artifact with aliases")
        for member in members:
            member.collection.members.remove(member)
        artifact.state = "DELETED"
        return Node("DeleteArtifactPayload", artifact=node)

    def linkArtifact(
        self,
        artifactID: str,
        artifactPortfolioName: str,
        entityName: str = "",
        projectName: str = "",
        aliases: Sequence[dict[str, str]] = (),
    ) -> Node:
        artifact = self.state.get(Artifact, artifactID)
        key = self.state.project(entityName, projectName)
        portfolio = self.state.collection(
            key, artifactPortfolioName, artifact.collection.type, portfolio=True
        )
        member = portfolio.added(artifact, self.state)
        for one in aliases:
            portfolio.point(member, one["alias"])
        return Node(
            "LinkArtifactPayload",
            versionIndex=member.index,
            artifactMembership=self._member(member),
        )

    def unlinkArtifact(self, artifactID: str, artifactPortfolioID: str) -> Node:
        portfolio = self.state.get(Collection, artifactPortfolioID)
        portfolio.members = [
            member for member in portfolio.members if member.artifact.node != artifactID
        ]
        return Node("UnlinkArtifactPayload", success=True)

    @ignoring("description", "templateVariableValues")
    def upsertSweep(
        self,
        id: str = "",
        config: str = "",
        entityName: str = "",
        projectName: str = "",
        state: str = "",
        displayName: str = "",
    ) -> Node:
        if id:
            sweep = self.state.get(Sweep, id)
        else:
            key, name = self.state.project(entityName, projectName), secrets.token_hex(4)
            sweep = self.state.sweeps[name] = self.state.new(Sweep, *key, name)
        if config:
            sweep.configure(config)
        sweep.state, sweep.name = state or sweep.state, displayName or sweep.name
        return Node("UpsertSweepPayload", sweep=self._sweep(sweep), configValidationWarnings=[])

    @ignoring("host", "projectName", "entityName")
    def createAgent(self, sweep: str) -> Node:
        if sweep not in self.state.sweeps:
            raise Refused(404, f"sweep {sweep} not found")
        agent = self.state.new(Agent, self.state.sweeps[sweep])
        return Node("CreateAgentPayload", agent=Node("Agent", id=agent.node))

    @ignoring("metrics")
    def agentHeartbeat(self, id: str, runState: str = "{}") -> Node:
        commands = self.state.get(Agent, id).sweep.commands(json.loads(runState))
        return Node("AgentHeartbeatPayload", agent=Node("Agent", id=id), commands=text(commands))


ROOTS: dict[str, type[Nodes]] = {"query": Queries, "mutation": Mutations}


def resolvers(root: Nodes) -> dict[str, Callable[..., Any]]:
    """The fields of a root type: its class's own public methods."""

    def taking_input(name: str) -> Callable[[dict[str, Any]], Any]:
        return lambda input: call(name, getattr(root, name), input)

    names = [name for name in vars(type(root)) if not name.startswith("_")]
    return {
        name: taking_input(name) if isinstance(root, Mutations) else getattr(root, name)
        for name in names
    }


# How the client reaches it


def streamed(run: Run, body: dict[str, Any]) -> None:
    """Take a message of the file stream: lines of files at their offsets, heartbeats, the end."""
    if unknown := body.keys() - {
        "files",
        "complete",
        "exitcode",
        "preempting",
        "uploaded",
        "dropped",
    }:
        raise Unknown(f"file stream with {unknown}")
    streams: dict[str, list[Any]] = {
        "wandb-history.jsonl": run.history,
        "wandb-events.jsonl": run.events,
    }
    streams["output.log"] = run.lines
    for name, chunk in (body.get("files") or {}).items():
        lines, offset = chunk["content"], chunk.get("offset", 0)
        if name == "wandb-summary.json":
            run.summary = json.loads(lines[-1])
            continue
        kept = streams.get(name)
        if kept is None or offset > len(kept):
            raise Unknown(f"file stream of {name} from line {offset}")
        if (
            name == "output.log"
        ):  # a line may change, such as a progress bar's, without what follows
            kept[offset : offset + len(lines)] = lines
        else:
            kept[offset:] = map(json.loads, lines)
    run.preempting = body.get("preempting") or run.preempting
    run.heartbeat = now()
    if body.get("complete"):
        run.exit_code = body["exitcode"]
        failed = "preempted" if run.preempting else "failed"
        run.state = failed if run.exit_code else "finished"
    else:
        run.state = "preempting" if run.preempting else "running"


@dataclass(frozen=True)
class Request:
    """One entry of the log; a request that gets no answer has the status 0."""

    time: str
    method: str
    path: str
    operation: str
    status: int


@dataclass(frozen=True)
class Fault:
    """How the server fails, and for what: `only` is graphql, file_stream, storage or all."""

    kind: str
    only: str = "all"
    over: threading.Event = field(default_factory=threading.Event)

    KINDS = ("refuse", "503", "401", "403", "404", "hang", "cut", "slow")
    PARTS: ClassVar = {
        "graphql": "graphql",
        "files": "file_stream",
        "storage": "storage",
        "artifactsV2": "storage",
    }

    def __post_init__(self) -> None:
        partial = self.only in self.PARTS.values() and self.kind != "refuse"
        if self.kind not in self.KINDS or not (partial or self.only == "all"):
            raise ValueError(f"no fault {self.kind} of {self.only}")


class Handler(BaseHTTPRequestHandler):
    """One connection of the client."""

    protocol_version = "HTTP/1.1"
    server: "Listener"

    def _handle(self) -> None:
        owner, content = (
            self.server.owner,
            self.rfile.read(int(self.headers.get("Content-Length") or 0)),
        )
        path = urlsplit(self.path).path
        part = Fault.PARTS.get(path.split("/")[1], "")
        self.operation, body = "", b""
        fault = owner.fault if owner.fault and owner.fault.only in ("all", part) else None
        if fault and fault.kind == "hang":
            owner.log(self.command, path, "", 0)
            fault.over.wait()
            self.close_connection = True
            return
        if fault and fault.kind == "slow":
            fault.over.wait(SLOW_SECONDS)
        try:
            if fault and fault.kind.isdigit():
                raise Refused(int(fault.kind), "fault")
            if (
                part in ("graphql", "file_stream")
                and self.headers.get("Authorization") != owner.authorization
            ):
                raise Refused(401, "user is not logged in")
            with owner.changed:
                status, body = 200, self._answer(owner, path, content)
        except Refused as refusal:
            status, body = refusal.status, text({"errors": [{"message": str(refusal)}]}).encode()
        except Exception as error:  # a resolver that fails has not understood the client either
            said = error if isinstance(error, Unknown) else repr(error)
            problem = f"{self.operation or self.path}: {said}"
            owner.unknown.append(problem)
            status, body = 400, text({"errors": [{"message": problem}]}).encode()
        owner.log(self.command, path, self.operation, status)
        self.send_response(status)
        self.send_header(
            "Content-Type", "application/json" if part == "graphql" else "application/octet-stream"
        )
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if (
            fault
            and fault.kind == "cut"
            and self.command == "GET"
            and path.startswith("/storage/blob/")
        ):
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = _handle

    def _answer(self, owner: "WandbServer", path: str, content: bytes) -> bytes:
        names = [unquote(name) for name in path.split("/")[1:]]
        match self.command, names:
            case "POST", ["graphql"]:
                return self._graphql(owner, json.loads(content))
            case "POST", ["files", entity, project, run, "file_stream"]:
                streaming = owner.state.run(entity, project, run)
                streamed(streaming, json.loads(content))
                return text({"stopped": streaming.stopping}).encode()
            case "GET" | "PUT" as method, ["storage", "run", entity, project, run, *file]:
                files = owner.state.run(entity, project, run).files
                return self._stored(files, "/".join(file), content if method == "PUT" else None)
            case "GET" | "PUT" as method, ["storage", "blob", digest, *_] | [
                "artifactsV2",
                _,
                _,
                _,
                _,
                _,
                digest,
                _,
            ]:
                if method == "PUT" and hashlib.md5(content).hexdigest() != digest:
                    raise Refused(400, "content does not match its digest")
                return self._stored(owner.state.blobs, digest, content if method == "PUT" else None)
            case "PUT", ["storage", "manifest", node]:
                owner.state.get(Artifact, node).manifest = json.loads(content)
                return b""
            case "GET", ["storage", "manifest", node]:
                return text(owner.state.get(Artifact, node).manifest).encode()
            case "POST", [
                "sdk",
                "otel",
                "v1",
                "metrics" | "logs" | "traces",
            ]:  # what the client tells of itself
                return b""
        raise Unknown(f"{self.command} of the path")

    def _stored(self, contents: dict[str, bytes], name: str, content: bytes | None) -> bytes:
        """Keeps a content that is given, and else gives the one that is kept."""
        if content is not None:
            contents[name] = content
            return b""
        if name not in contents:
            raise Refused(404, f"{name} not found")
        return contents[name]

    def _graphql(self, owner: "WandbServer", request: dict[str, Any]) -> bytes:
        document = Document(request["query"])
        self.operation = document.name
        if document.kind not in ROOTS:
            raise Unknown(f"a {document.kind}")
        root = Node(
            document.kind.title(), **resolvers(ROOTS[document.kind](owner.state, owner.url))
        )
        data = Execution(document, request.get("variables") or {}).node(root, document.selections)
        return text({"data": data}).encode()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the console: `requests` has it."""


class Listener(ThreadingHTTPServer):
    """The listening socket and the connections it accepted."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, owner: "WandbServer", port: int) -> None:
        self.owner = owner
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing when the client goes away; `unknown` has what an answer failed at."""

    def close(self) -> None:
        """Stops listening and ends the connections."""
        self.shutdown()
        self.server_close()
        for accepted in list(self._connections):
            with contextlib.suppress(OSError):
                accepted.shutdown(socket.SHUT_RDWR)


class WandbServer:
    """A server while its context lasts; `check` at the end tells of all that is not modelled."""

    def __init__(self) -> None:
        self.key = secrets.token_hex(20)
        self.authorization = "Basic " + base64.b64encode(f"api:{self.key}".encode()).decode()
        self.state = State()
        self.unknown: list[str] = []
        self.requests: deque[Request] = deque(maxlen=10_000)
        self.changed = threading.Condition()
        self.fault: Fault | None = None
        self._reserved: socket.socket | None = (
            None  # keeps the port, without listening, while connections are refused
        )
        self._listener = Listener(self, 0)
        self.port: int = self._listener.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if kind is None:
            self.check()

    def close(self) -> None:
        """Stops serving; what was told stays readable."""
        self.recover()
        self._listener.close()

    def check(self) -> None:
        """Fails if the client sent anything that the server does not model."""
        assert not self.unknown, "the server does not model:\n" + "\n".join(self.unknown)

    def env(self) -> dict[str, str]:
        """What brings a client here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": self.key}

    def log(self, method: str, path: str, operation: str, status: int) -> None:
        with self.changed:
            self.requests.append(Request(now(), method, path, operation, status))
            self.changed.notify_all()

    def fail(self, kind: str, only: str = "all") -> None:
        """Fail from now on: "refuse" connections, answer "503", ..., "slow", "hang", or "cut"."""
        fault = Fault(kind, only)
        self.recover()
        if kind == "refuse":
            self._listener.close()
            self._reserved = socket.socket()
            self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._reserved.bind(("127.0.0.1", self.port))
        self.fault = fault

    def recover(self) -> None:
        """Ends a fault."""
        if self.fault:
            self.fault.over.set()
            self.fault = None
        if self._reserved:
            self._reserved.close()
            self._reserved = None
            self._listener = Listener(self, self.port)

    @contextlib.contextmanager
    def failing(self, kind: str, only: str = "all") -> Iterator[None]:
        """Fails as long as the context lasts."""
        self.fail(kind, only)
        try:
            yield
        finally:
            self.recover()

    @property
    def denied(self) -> set[str]:
        """The names of collections and projects that the key may neither read nor write."""
        return self.state.denied

    def wait(self, reached: Callable[[Self], bool], timeout: float = 120) -> None:
        """Waits until a request has made this true."""
        with self.changed:
            assert self.changed.wait_for(lambda: reached(self), timeout), "not reached in time"

    def count(self, operation: str) -> int:
        """How often an operation of GraphQL was asked for."""
        with self.changed:
            return sum(request.operation == operation for request in self.requests)

    @property
    def runs(self) -> dict[str, Run]:
        """The runs by their ids."""
        return {run.id: run for run in list(self.state.runs.values())}

    @property
    def collections(self) -> dict[str, Collection]:
        """The collections by their names, of registries too."""
        return {collection.name: collection for collection in list(self.state.collections.values())}

    @property
    def sweeps(self) -> dict[str, Sweep]:
        return dict(self.state.sweeps)

    def dump(self) -> dict[str, Any]:
        """All of it as plain data; contents as their sizes."""
        with self.changed:
            return {
                "runs": {run.id: self._dumped_run(run) for run in self.state.runs.values()},
                "artifacts": {
                    one.name: self._dumped(one) for one in self.state.collections.values()
                },
                "sweeps": {
                    sweep.id: {
                        "config": sweep.config,
                        "state": sweep.state,
                        "runs": list(sweep.runs),
                    }
                    for sweep in self.state.sweeps.values()
                },
                "unknown": list(self.unknown),
            }

    def _dumped_run(self, run: Run) -> dict[str, Any]:
        names = "entity project id name group job_type tags notes state exit_code program host"
        names += " commit remote sweep"
        plain = {
            name: getattr(run, name)
            for name in f"{names} config history events output summary".split()
        }
        versions = {
            name: [f"{one.collection.name}:v{one.index}" for one in getattr(run, name)]
            for name in ("used", "logged")
        }
        metrics = {name: vars(metric) for name, metric in run.metrics.items()}
        files = {name: len(content) for name, content in run.files.items()}
        return plain | versions | {"metrics": metrics, "files": files}

    def _dumped(self, collection: Collection) -> dict[str, Any]:
        versions = [
            {
                "index": member.index,
                "digest": member.artifact.digest,
                "state": member.artifact.state,
                "aliases": member.aliases,
                "metadata": member.artifact.metadata,
                "description": member.artifact.description,
                "size": member.artifact.size,
                "entries": member.artifact.entries,
            }
            for member in collection.members
        ]
        place = {"entity": collection.entity, "project": collection.project}
        return place | {
            "type": collection.type,
            "portfolio": collection.portfolio,
            "versions": versions,
        }
