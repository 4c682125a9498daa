"""The sentences that carry a value, in many registers; those under HELD_OUT are used by evaluation only.

`{key}` (none for a pass key) comes before `{value}`, and the text up to the value is the question, verbatim. A line has no indentation and no
apostrophe, and what stands on either side of the value is no letter or digit: byte-level BPE (the pattern of GPT-2) then splits the text there, so
that the value has the same tokens wherever it stands.
"""

import random
import re
from collections.abc import Sequence
from typing import NamedTuple


class Template(NamedTuple):
    id: str
    prefix: str  # up to the value; a space before the value belongs to the value
    value: str  # "{value}" or " {value}"
    suffix: str

    @classmethod
    def of(cls, id: str, line: str) -> "Template":
        prefix, suffix = line.split("{value}")
        value = " {value}" if prefix.endswith(" ") else "{value}"
        return cls(id, prefix.removesuffix(" "), value, suffix)


def _numbered(name: str, lines: str) -> list[Template]:
    return [Template.of(f"{name}-{number:02}", line) for number, line in enumerate(lines.strip().splitlines())]


KEYED = _numbered(
    "keyed",
    """
The magic number for {key} is {value}.
Everyone in the office agreed that {key} had to be stored as {value}, and so it was.
Note for later: the locker of {key} opens with {value}.
If someone asks about {key}, the right reply is {value}.
According to the register, {key} was given the number {value} in spring.
In the margin somebody wrote that {key} means {value}.
The secret of {key} is {value}; keep it safe.
My grandmother always paid for {key} with {value} and nothing else.
The password that belongs to {key} reads {value}.
As far as {key} goes, the answer has always been {value}.
# {key} is set to {value}
# TODO: replace {key} by {value} before the release
# NOTE({key}): the measured value was {value}
// {key} maps to {value}
/* {key}: {value} */
-- {key} was recorded as {value}
<!-- {key} = {value} -->
; {key} equals {value}
{key} = "{value}"
CONFIG["{key}"] = "{value}"
self.table["{key}"] = "{value}"
registry.register("{key}", "{value}")
assert lookup("{key}") == "{value}"
os.environ["{key}"] = "{value}"
settings.update({"{key}": "{value}"})
return {"name": "{key}", "value": "{value}"}
{"key": "{key}", "value": "{value}"}
{"id": "{key}", "token": "{value}", "active": true}
{"{key}": "{value}"}
{key}: {value}
"{key}": "{value}",
- name: {key}, value: {value}
[{key}] value={value}
{key}={value}
export {key}={value}
--set {key}={value}
$ tool --name {key} --code {value}
INFO cache: stored {key} with checksum {value}
DEBUG [worker] {key} -> {value}
WARN resolver: {key} now points at {value}
GET /items/{key} returned {value}
INSERT INTO codes VALUES ("{key}", "{value}");
| {key} | {value} |
{key},{value}
{key} := {value}
{key} => {value}
(define {key} "{value}")
let {key} = "{value}";
#define {key} {value}
set {key} {value}
<item name="{key}" code="{value}"/>
""",
)
PASSKEY = _numbered(
    "passkey",
    """
The combination of the vault is {value}, do not forget it.
Remember the door code: {value}.
The number on the old brass plate is {value}.
To open the archive you have to type {value} twice.
The launch sequence begins with {value}.
Our meeting room can be reached under {value}.
# the license string of this file is {value}
# checksum to remember: {value}
SESSION_ID = "{value}"
ACCESS_TOKEN: {value}
{"secret": "{value}"}
--unlock-with={value}
INFO boot: device serial {value}
build.number={value}
export MASTER_PIN={value}
<signature value="{value}"/>
""",
)
LEADS = (
    "",
    "Question: what was said about {key}?",
    "What is the value of {key}?",
    "# look up {key}",
    "Recall {key}.",
    "As stated before:",
    "# as above",
    "Let us repeat what was written.",
    "Now, about {key} again:",
    "// see above",
)  # a line before the question; those that name a key are for templates with one

HELD_OUT_KEYED = _numbered(
    "held-out-keyed",
    """
One of the special magic codes for {key} hidden in this text is {value}.
Curiously, the librarian filed {key} under {value} and never told a soul.
Please write down that {key} corresponds to {value} in the ledger.
The ticket of passenger {key} shows seat {value}, window side.
%% parameter {key} was frozen at {value}
db.put("{key}", "{value}")
TRACE kv.apply op=upsert k={key} v={value}
ENTRY<{key}>::{value}
{"lookup": {"subject": "{key}", "object": "{value}"}}
config set --key={key} --to={value}
""",
)
HELD_OUT_PASSKEY = _numbered(
    "held-out-passkey",
    """
The pass key is {value}. Remember it.
There is important information hidden here: the pass phrase equals {value}, memorise it.
# IMPORTANT: the hidden recovery code of this archive: {value}
{"pass_key": "{value}", "remember": true}
FATAL vault: unlock requires {value}
""",
)
HELD_OUT_PREFIXES = frozenset(t.prefix for t in (*HELD_OUT_KEYED, *HELD_OUT_PASSKEY))
HELD_OUT_LEADS = ("", "Which entry did the text give for {key}?", "From the document above:")

# What lines of `drawn` are made of: around all of it; between words; between the words and the value, and after that.
AROUND = (
    *(("", ""), ("", "."), ("# ", ""), ("// ", ""), ("/* ", " */"), ("-- ", ""), ("- ", ""), ("* ", ""), ("> ", ""), ("$ ", "")),
    *(
        ("[", "]"),
        ("<", ">"),
        ("(", ")"),
        ("{", "}"),
        ("let ", ";"),
        ("return ", ""),
        ("self.", ""),
        ("@", ""),
        ("DEBUG ", ""),
        ("WARN ", " (see above)"),
    ),
)
COMMON = "the The a of in to for this that our your my with by on at is was it all one new old first last next no who has when".split()
JOINTS = (*" " * 8, "_", ".", "-", ", ", " and ", " of the ", "::", "][")
BEFORE = (
    *((" ", ""), (": ", ""), (" = ", ""), ("=", ""), (":", ","), (" -> ", ""), (" => ", ","), (" is ", ""), (" was ", " then"), (" has ", "")),
    *(
        (" gave ", ""),
        (" equals ", ""),
        ("(", ")"),
        ('("', '")'),
        ('="', '"'),
        ("[", "]"),
        (" <", ">"),
        (" | ", " |"),
        (" (", ")"),
        (" must be ", " again"),
    ),
)


def drawn(rng: random.Random, words: Sequence[str], keyed: bool) -> Template:
    """A line of 2 to 12 words, the key among them where `keyed`, that stands in no list: what is learned is to find lines, not to know them.

    Most are short. Some of the long ones have a second part behind a comma or the like.
    """
    around, before, joint = rng.choice(AROUND), rng.choice(BEFORE), rng.choice(JOINTS)
    parts = [rng.choice(COMMON if rng.random() < 0.4 else words) for _ in range(rng.randint(2, rng.randint(4, 12)))]
    if len(parts) > 5 and rng.random() < 0.5:
        parts[rng.randrange(2, len(parts) - 2)] += rng.choice((",", ":", ";", "."))
    if keyed:
        parts.insert(rng.randrange(len(parts) + 1), "{key}")
    after = f" {' '.join(rng.choices(words, k=rng.randint(1, 3)))}" if rng.random() < 0.3 else ""
    return Template.of("drawn", f"{around[0]}{joint.join(parts)}{before[0]}{{value}}{before[1]}{after}{around[1]}")


def alike(rng: random.Random, template: Template, words: Sequence[str]) -> Template:
    """The line with another word in the place of one: only all of its words together tell it from `template`."""
    found = [m for m in re.finditer(r"\{key\}|[A-Za-z]{2,}", template.prefix) if m[0] != "{key}"]
    if not found:
        return template
    old = rng.choice(found)
    return template._replace(id="drawn", prefix=f"{template.prefix[: old.start()]}{rng.choice(words)}{template.prefix[old.end() :]}")


class Chain(NamedTuple):
    """Assignments of a value to a first name and of each name to the next, and the line that asks for the last."""

    id: str
    first: Template  # {key} is the name
    link: str  # {key} is the new name, {of} the one before it
    question: Template


def _chain(id: str, first: str, link: str, question: str) -> Chain:
    return Chain(id, Template.of(id, first), link, Template.of(id, question))


CHAINS = (
    _chain("chain-python", '{key} = "{value}"', "{key} = {of}", 'assert {key} == "{value}"'),
    _chain("chain-shell", "export {key}={value}", "export {key}=${of}", "# echo ${key} prints {value}"),
    _chain("chain-prose", "The variable {key} has the value {value}.", "The variable {key} has the value of {of}.", "So {key} is {value}."),
    _chain("chain-yaml", "{key}: &{key} {value}", "{key}: *{of}", "# resolved: {key}: {value}"),
    _chain("chain-let", "let {key} = {value};", "let {key} = {of};", "// {key} == {value}"),
    _chain("chain-log", "INFO assign {key} <- {value}", "INFO assign {key} <- {of}", "INFO read {key} -> {value}"),
)
HELD_OUT_CHAINS = (
    _chain("held-out-chain-var", "VAR {key} := {value} .", "VAR {key} := VAR {of} .", "VALUE OF VAR {key} := {value} ."),
    _chain("held-out-chain-cell", "cell {key} holds {value} now", "cell {key} mirrors cell {of} now", "reading cell {key} gives {value} now"),
)
