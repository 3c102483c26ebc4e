"""GraphQL as W&B's client speaks it: documents are parsed, and resolved field by field on nodes.

A field or an argument that a node does not have is an error, as it is for a server with a schema.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

INTERFACES = {"ArtifactSequence": "ArtifactCollection", "ArtifactPortfolio": "ArtifactCollection"}


class Unknown(Exception):
    """The client sent what this server does not model."""


@dataclass(frozen=True)
class Variable:
    name: str


@dataclass(frozen=True)
class Field:
    """A field to resolve; `included` pairs conditions of @include and @skip with wanted values."""

    key: str
    name: str
    arguments: dict[str, Any]
    included: list[tuple[Any, bool]]
    selections: "list[Field | Fragment]"


@dataclass(frozen=True)
class Fragment:
    """An inline fragment, which has selections, or the spread of a named one."""

    name: str
    type: str
    included: list[tuple[Any, bool]]
    selections: "list[Field | Fragment]"


class Document:
    """A parsed document: one operation and the fragments it spreads."""

    TOKEN = re.compile(
        r'(?P<space>[\s,]+|#.*)|(?P<string>"(?:\\.|[^"\\])*")'
        r"|(?P<number>-?\d[\w.+-]*)|(?P<word>\.\.\.|\w+|.)"
    )

    def __init__(self, text: str) -> None:
        self._tokens = [m for m in self.TOKEN.finditer(text) if m.lastgroup != "space"]
        self._position = 0
        self.kind = self.name = ""
        self.defaults: dict[str, Any] = {}
        self.selections: list[Field | Fragment] = []
        self.fragments: dict[str, Fragment] = {}
        while self._next:
            if self._found("fragment"):
                name, _, type = self._take(), self._take("on"), self._take()
                self.fragments[name] = Fragment(name, type, [], self._selections())
            elif self.kind:
                raise Unknown("a document with two operations")
            else:
                self._operation()

    @property
    def _next(self) -> str:
        return self._tokens[self._position].group() if self._position < len(self._tokens) else ""

    def _take(self, expected: str = "") -> str:
        token = self._next
        if not token or (expected and token != expected):
            raise Unknown(f"GraphQL with {token!r} where {expected or 'more'} is expected")
        self._position += 1
        return token

    def _found(self, token: str) -> bool:
        if self._next != token:
            return False
        self._position += 1
        return True

    def _operation(self) -> None:
        self.kind = "query" if self._next == "{" else self._take()
        if self._next not in ("(", "{"):
            self.name = self._take()
        if self._found("("):
            while not self._found(")"):
                self._take("$")
                name, _ = self._take(), self._take(":")
                while self._next not in ("=", "$", ")"):
                    self._take()
                if self._found("="):
                    self.defaults[name] = self._value()
        self.selections = self._selections()

    def _selections(self) -> list[Field | Fragment]:
        self._take("{")
        selections: list[Field | Fragment] = []
        while not self._found("}"):
            if self._found("..."):
                inline = self._next in ("on", "{", "@")
                name = "" if inline else self._take()
                type = self._take() if self._found("on") else ""
                included = self._included()
                selections.append(
                    Fragment(name, type, included, self._selections() if inline else [])
                )
            else:
                key = name = self._take()
                if self._found(":"):
                    name = self._take()
                arguments, included = self._arguments(), self._included()
                inner = self._selections() if self._next == "{" else []
                selections.append(Field(key, name, arguments, included, inner))
        return selections

    def _included(self) -> list[tuple[Any, bool]]:
        included = []
        while self._found("@"):
            directive = self._take()
            if directive not in ("include", "skip"):
                raise Unknown(f"directive @{directive}")
            included.append((self._arguments()["if"], directive == "include"))
        return included

    def _arguments(self) -> dict[str, Any]:
        return self._pairs(")") if self._found("(") else {}

    def _pairs(self, end: str) -> dict[str, Any]:
        pairs = {}
        while not self._found(end):
            name, _ = self._take(), self._take(":")
            pairs[name] = self._value()
        return pairs

    def _value(self) -> Any:
        if self._found("$"):
            return Variable(self._take())
        if self._found("{"):
            return self._pairs("}")
        if self._found("["):
            values = []
            while not self._found("]"):
                values.append(self._value())
            return values
        kind, token = self._tokens[self._position].lastgroup, self._take()
        if kind in ("string", "number"):
            return json.loads(token)
        return {"true": True, "false": False, "null": None}.get(token, token)


class Node:
    """An object of a GraphQL type.

    A field is a value or, where it takes arguments or costs something, a function.
    """

    def __init__(self, type: str, **fields: Any) -> None:
        self.type, self.fields = type, {"__typename": type} | fields


def taken(source: object, names: str) -> dict[str, Any]:
    """Fields that are attributes: "name", or "field=name"."""
    return {name.split("=")[0]: getattr(source, name.split("=")[-1]) for name in names.split()}


def call(place: str, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call a resolver, unless it does not take these arguments; null counts as not given."""
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        inspect.signature(function).bind(**given)
    except TypeError as error:
        raise Unknown(f"{place}: {error}") from None
    return function(**given)


def ignoring(*names: str) -> Callable[[Callable[..., Node]], Callable[..., Node]]:
    """Lets a resolver take arguments that make no difference to this server."""

    def wider(resolver: Callable[..., Node]) -> Callable[..., Node]:
        def resolve(nodes: Any, **arguments: Any) -> Node:
            used = {name: value for name, value in arguments.items() if name not in names}
            node: Node = call(resolver.__name__, partial(resolver, nodes), used)
            return node

        return resolve

    return wider


class Execution:
    """Resolves a document's selections against nodes."""

    def __init__(self, document: Document, variables: dict[str, Any]) -> None:
        self._fragments, self._variables = document.fragments, document.defaults | variables

    def node(self, node: Node, selections: list[Field | Fragment]) -> dict[str, Any]:
        fields: dict[str, list[Field]] = {}
        for found in self._flat(node, selections):
            fields.setdefault(found.key, []).append(found)
        return {key: self._field(node, same) for key, same in fields.items()}

    def _flat(self, node: Node, selections: list[Field | Fragment]) -> Iterator[Field]:
        for selection in selections:
            if any(
                bool(self._given(condition)) is not wanted
                for condition, wanted in selection.included
            ):
                continue
            if isinstance(selection, Field):
                yield selection
                continue
            fragment = self._fragments[selection.name] if selection.name else selection
            if fragment.type in ("", node.type, INTERFACES.get(node.type)):
                yield from self._flat(node, fragment.selections)

    def _field(self, node: Node, same: list[Field]) -> Any:
        place = f"{node.type}.{same[0].name}"
        if same[0].name not in node.fields:
            raise Unknown(place)
        value, arguments = node.fields[same[0].name], self._given(same[0].arguments)
        if callable(value):
            value = call(place, value, arguments)
        elif arguments:
            raise Unknown(f"{place}: {arguments}")
        return self._completed(place, value, [inner for one in same for inner in one.selections])

    def _completed(self, place: str, value: Any, selections: list[Field | Fragment]) -> Any:
        if isinstance(value, list):
            return [self._completed(place, item, selections) for item in value]
        if value is not None and isinstance(value, Node) is not bool(selections):
            raise Unknown(
                f"{place}: {'no fields' if isinstance(value, Node) else 'fields of a scalar'}"
            )
        return self.node(value, selections) if isinstance(value, Node) else value

    def _given(self, value: Any) -> Any:
        if isinstance(value, Variable):
            return self._variables.get(value.name)
        if isinstance(value, list):
            return [self._given(item) for item in value]
        if isinstance(value, dict):
            omitted = {
                k
                for k, v in value.items()
                if isinstance(v, Variable) and v.name not in self._variables
            }
            return {key: self._given(item) for key, item in value.items() if key not in omitted}
        return value


def connection(
    nodes: list[Node], first: int | None = None, after: str | None = None, **edges: list[Any]
) -> Node:
    """A page of nodes; `edges` are further fields of the edges."""
    start = int(after or 0)
    end = len(nodes) if first is None else min(start + first, len(nodes))
    page = [
        Node(
            "Edge",
            node=nodes[i],
            cursor=str(i + 1),
            **{name: values[i] for name, values in edges.items()},
        )
        for i in range(start, end)
    ]
    info = Node("PageInfo", endCursor=str(end), hasNextPage=end < len(nodes))
    return Node("Connection", edges=page, pageInfo=info, totalCount=len(nodes))


def paged(nodes: Callable[[], list[Any]]) -> Callable[..., Node]:
    """A connection's field."""
    return lambda first=None, after=None: connection(nodes(), first, after)
