"""What the table of a family holds, and how a config.json becomes a ModelConfig by it and the other way.

A family is one file, ltrain/families/models/MODEL_TYPE.py, that sets FAMILY = Family(...); being there makes it known. In it:

1. `mixers` and `ffns`: a Role for each kind of layer part that the family has, under a name of the file's own (the words of
   config.json's layer_types do well). A role says which of our mixers it is, what is always so of its options (`fixed`; `block` stands
   among a mixer's as in a config), how it rotates (`rope`), and its weights' names. A layer without a mixer has a role of mixer none,
   one without a feed-forward a role of experts 0 and inner 0. Kinds that differ in anything but numbers are two roles: with and
   without RoPE, sliding and full. What `fixed` says tells roles apart on the way out, so name the more particular role first.
2. `roles`: which (mixer, feed-forward) each layer has, out of a config.json; `role_keys` writes the same back.
3. `keys`: each key of config.json that is a number or a word of the model, with the option that it sets. `key` has what varies:
   defaults, keys in mappings ("a.b"), lists over the layers, values that must be converted or computed out of others.
4. `constants`: keys of which one value is supported. `indifferent`: keys that change nothing. Any other key is refused by name.
5. Weights outside the layers, and norms of every layer. `weights.py` says what a row can do: parts fused or apart, interleaved by
   groups, transposed, experts stacked, several of ours in one of theirs. `computed` are tensors that options make, `ignored` those
   that are no part of the model, `renames` other names of the same. ltrain/families/tables.py has what many families share.

Then tests/families/cases/MODEL_TYPE.py: one config of transformers that has every part, and its branches; the tests there compare
logits, gradients, decoding and files with transformers' own model. What a table cannot say is a missing option of the model.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

from torch import Tensor

from ltrain.families import rope
from ltrain.families.rope import Rope
from ltrain.families.weights import Row, Table, Weight, resolve
from ltrain.model.options import MIXERS, BlockOptions, Branch, FeedForwardOptions, ModelConfig, MoEOptions, ParallelOptions, SharedOptions
from ltrain.model.stack import Stack
from ltrain.pattern import LayerSpec, resolve_layers, shared_layer
from ltrain.schema import ConfigError

REQUIRED = object()

# Of a config.json: what does not change the model, or only how a loss or a sampler of others works.
_INDIFFERENT = {
    *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "pretraining_tp", "output_router_logits"),
    *("auto_map", "_attn_implementation", "attn_implementation", "task_specific_params", "chunk_size_feed_forward", "problem_type"),
    *("output_attentions", "output_hidden_states", "return_dict", "is_encoder_decoder", "id2label", "label2id"),
}

_TRAINING = ("aux_loss", "bias_rate", "index_loss", "index_loss_weight")  # options that no inference reads
_NOT_COMPUTED = ("pattern", "layers", "ffn", "block", "z_loss", "init_std")  # of ModelConfig: what is compared layer by layer, or only trains

Roles = list[tuple[str, str]]  # per layer: the names of its mixer and its feed-forward in the table
Config = dict[str, Any]  # a config.json


@dataclass(frozen=True)
class Key:
    """A key of config.json and the options of ours that it sets, all alike.

    theirs: "a.b" is key b of the mapping a, "a.0" the first of the list a; "" is none: the options are computed from other keys, by `read`.
    ours: a field of ModelConfig, or ROLE.option of a mixer or feed-forward; *.option is every mixer's that has it and does not fix
    it. An option may be in a mapping, as in attention.rope.pairs.
    """

    theirs: str
    ours: tuple[str, ...]
    also: tuple[str, ...] = ()  # other names of the key, read where config.json has not the first
    default: Any = REQUIRED  # where config.json has no such key or null: a value, or a function of the config.json
    nullable: bool = False  # null is a value, read as None, and not the default
    per_layer: bool = False  # theirs is a list with a value for each layer
    absent: Any = None  # with per_layer: what it holds for layers that have no such option
    read: Callable[[Any, Config], Any] | None = None  # their value, config.json -> ours
    write: Callable[[Any, Config], Any] | None = None  # our value, config.json as far as it is written -> theirs

    def value(self, config: Config) -> Any:
        """Theirs."""
        for name in (self.theirs, *self.also) if self.theirs else ():
            *parents, last = name.split(".")
            place: Any = reduce(lambda part, parent: part.get(parent) or {}, parents, config)
            if isinstance(place, list):
                return place[int(last)]
            if place.get(last) is not None or self.nullable and last in place:
                return place.get(last)
        if self.default is REQUIRED:
            if not self.theirs:
                return None
            raise ConfigError(f"config.json has no {self.theirs}: add it")
        return self.default(config) if callable(self.default) else self.default


def key(theirs: str, *ours: str, **rest: Any) -> Key:
    return Key(theirs, ours, **rest)


@dataclass(frozen=True)
class Role:
    """A kind of mixer or feed-forward that the family has."""

    weights: tuple[Weight, ...]  # names below layers.N.mixer (or .ffn) in ours and below the layer in theirs
    fixed: dict[str, Any] = field(default_factory=dict)  # options that are always so
    mixer: str = ""  # a key of MIXERS; a feed-forward has none
    rope: Rope | None = None  # how its options' `rope` stands in config.json; None: it has none, or fixes it
    layer_weights: tuple[Weight, ...] = ()  # below the layer in both: what only layers of this role have, its norms
    # tensors of theirs that are computed from options, below the layer: name -> of the part's options, the layer's index and the model's depth
    computed: dict[str, Callable[[Any, int, int], Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Shared:
    """Where the blocks stand whose weights layers share (`model.shared`): in the first of the layers that use each.

    What is in them is one layer more at the end of what `roles` gives and `role_keys` takes, with roles of its own.
    """

    at: str  # what their names in a block start with, {layer} being that first layer
    uses: tuple[Weight, ...]  # below it, what each layer has of its own: {use} counts these layers; in ours below the layer's `shared.`


@dataclass(frozen=True)
class Family:
    """One Hugging Face model_type."""

    model_type: str
    architecture: str
    keys: tuple[Key, ...]
    mixers: dict[str, Role]
    ffns: dict[str, Role]  # a role is dense where its fixed options say experts: 0
    roles: Callable[[Config], Roles]  # of a config.json
    weights: tuple[Weight, ...]  # outside the layers
    older: Callable[[Config], Config] = lambda config: config  # a config.json in another spelling -> in the words of the table, all of it
    role_keys: Callable[[Roles], Config] = lambda roles: {}  # of a config.json that `roles` reads so
    role_names: tuple[str, ...] = ()  # keys of config.json that `roles` reads, beside num_hidden_layers
    layer_weights: tuple[Weight, ...] = ()  # of every layer: its norms
    constants: dict[str, Any] = field(default_factory=dict)  # key of config.json -> the one value that is supported, also where it is absent
    indifferent: tuple[str, ...] = ()  # keys of config.json that do not change the model, beside those of all families
    shared: Shared | None = None
    layer: str = "model.layers.{layer}."  # what their names in a layer start with
    length: str = "max_position_embeddings"  # the key of the longest sequence; '': none
    model: dict[str, Any] = field(default_factory=dict)  # fields of ModelConfig that are always so
    renames: tuple[tuple[str, str], ...] = ()  # in names that others than transformers save: what stands there -> what the table says
    ignored: tuple[str, ...] = ()  # patterns of their tensors that are no part of the model, with {depth} for the number of a layer behind its last

    def to_model(self, config: Config) -> ModelConfig:
        """The model that a config.json describes. Errors: ConfigError for whatever it asks and ours has not."""
        config = self.older(config)
        self._refuse_unknown(config)
        roles = self.roles(config)
        parts = [(self._start(self.mixers, mixer, config), self._start(self.ffns, ffn, config)) for mixer, ffn in roles]
        depth = len(roles) - (self.shared is not None)
        model: dict[str, Any] = copy.deepcopy({"depth": depth, "block": {}, "shared": {}, **self.model})
        for k in self.keys:
            if all(self._places(ours, roles) == [] for ours in k.ours):  # no layer asks for it
                continue
            value = k.value(config)
            if k.per_layer and len(value) != len(roles):
                raise ConfigError(f"{k.theirs} in config.json has {len(value)} values for {len(roles)} layers: write one for each")
            for ours in k.ours:
                places = self._places(ours, roles)
                if places is None:
                    _put(model, ours, k.read(value, config) if k.read else value)
                    continue
                for index, part, option in places:
                    theirs = value[index] if k.per_layer else value
                    _put(parts[index][part], option, k.read(theirs, config) if k.read else theirs)
        if depth != model["depth"]:
            raise ConfigError(f"config.json gives {depth} layers a type and num_hidden_layers={model['depth']}: write one for each layer")
        full = [MoEOptions(**ffn) for _, ffn in parts]
        common = next((ffn for ffn in full if ffn.experts), full[0])
        layers: dict[str, dict[str, Any]] = {}
        pattern = []
        for (mixer, ffn), (options, _), own in zip(roles, parts, full, strict=True):
            kind = {"mixer": self.mixers[mixer].mixer, **options, **({} if own == common else {"ffn": _differing(own, common)})}
            names = [mixer if own == common else f"{mixer}_{ffn}", *(f"{mixer}_{ffn}_{n}" for n in range(2, len(roles) + 2))]
            name = next(name for name in names if layers.get(name, kind) == kind)
            layers[name] = kind
            pattern.append(name)
        model["block"] = BlockOptions(**model["block"])
        model["shared"] = SharedOptions(layer=pattern[-1] if self.shared else "", **model["shared"])
        found = ModelConfig(pattern=_period(pattern[:depth]), layers=layers, ffn=common, **model)
        resolve_layers(found)
        return found

    def to_config(self, model: ModelConfig, vocab: int, length: int) -> Config:
        """A config.json of the model. length: its longest sequence. Errors: ConfigError where the family has no such model."""
        specs = self._specs(model)
        roles = self.roles_of(specs)
        model = dataclasses.replace(model, vocab=vocab)
        config: Config = {"model_type": self.model_type, "architectures": [self.architecture]}
        for name, value in {**self.constants, **self.role_keys(roles)}.items():
            _put(config, name, value)
        length = self._write_ropes(config, specs, roles, length)
        if self.length:
            config[self.length] = length
        for k in self.keys:
            if k.theirs:
                self._write(config, k, model, specs, roles)
        difference = self.difference(model, config)
        if difference:
            raise ConfigError(f"{self.model_type} has no model with {difference}: export as another family, or train one that has it")
        return config

    def table(self, stack: Stack) -> Table:
        """Every tensor of a whole model under both names."""
        rows: list[Row] = []

        def add(ours: str, theirs: str, spec: LayerSpec, mixer: Role, ffn: Role, norms: tuple[Weight, ...]) -> None:
            rows.append((f"{ours}mixer.", theirs, mixer.weights, spec.options))
            rows.append((f"{ours}ffn.", theirs, ffn.weights, spec.ffn))
            rows.append((ours, theirs, (*mixer.layer_weights, *ffn.layer_weights, *norms), None))

        parts = list(self._parts(stack.model))
        for index, (spec, roles) in enumerate(parts[: stack.model.depth]):
            add(f"layers.{index}.", self.layer.format(layer=index), spec, *roles, self.layer_weights)
        if self.shared:
            blocks, users = stack.model.shared.blocks, [i for i, (spec, _) in enumerate(parts) if spec.block.shared]
            for use, layer in enumerate(users):
                theirs = self.shared.at.format(layer=users[use % blocks])
                rows.append((f"layers.{layer}.shared.", theirs, tuple(weight.counted(use) for weight in self.shared.uses), None))
                if use < blocks:
                    spec, roles = parts[-1]
                    add(f"shared.{use}.", theirs, spec, *roles, ())
        return resolve(stack, [*rows, ("", "", self.weights, None)])

    def computed(self, model: ModelConfig) -> dict[str, Callable[[], Tensor]]:
        """Tensors of theirs that are made of options: name -> what makes it."""
        found: dict[str, Callable[[], Tensor]] = {}
        for index, (spec, roles) in enumerate(self._parts(model)):
            for role, options in zip(roles, (spec.options, spec.ffn), strict=True):
                for name, make in role.computed.items():
                    found[self.layer.format(layer=index) + name] = partial(make, options, index, model.depth)
        return found

    def longest(self, config: Config) -> int:
        """The longest sequence that a config.json names; 0: none."""
        return int(config.get(self.length) or 0)

    def rope_keys(self) -> set[str]:
        """Keys of config.json that say where positions are and how far they go."""
        return {*rope.KEYS, self.length, *(role.rope.theta for role in self.mixers.values() if role.rope)}

    def roles_of(self, specs: list[LayerSpec]) -> Roles:
        """Which of the roles each layer has. Errors: ConfigError for a layer that the family has not."""
        return [(self._mixer(spec), self._ffn(spec)) for spec in specs]

    def _parts(self, model: ModelConfig) -> Iterator[tuple[LayerSpec, tuple[Role, Role]]]:
        specs = self._specs(model)
        for spec, (mixer, ffn) in zip(specs, self.roles_of(specs), strict=True):
            yield spec, (self.mixers[mixer], self.ffns[ffn])

    def _specs(self, model: ModelConfig) -> list[LayerSpec]:
        """A model's layers, and what is in the blocks that they share."""
        if bool(model.shared.blocks) != (self.shared is not None):
            raise ConfigError(
                f"{self.model_type} has {'' if self.shared else 'no '}blocks that layers share: model.shared.blocks={model.shared.blocks}"
            )
        return [*resolve_layers(model), *([shared_layer(model)] if self.shared else [])]

    def _start(self, roles: dict[str, Role], name: str, config: Config) -> dict[str, Any]:
        """The options that a role has before any key is read."""
        if name not in roles:
            raise ConfigError(f"config.json gives a layer the type {name!r}, not known for {self.model_type}: write {' or '.join(roles)}")
        role = roles[name]
        options = copy.deepcopy(role.fixed)
        if role.rope:
            others = {k.theirs.rpartition(".")[2] for k in self.keys} | {name.rpartition(".")[2] for name in self.indifferent}
            found = rope.from_config(config, role.rope, others)
            if role.rope.fraction is None and found.fraction != 1:
                raise ConfigError(f"partial_rotary_factor={found.fraction:g} in config.json: {self.model_type} rotates whole heads, take it out")
            _put(options, role.rope.at, _differing(found, type(found)()))
        return options

    def _places(self, ours: str, roles: Roles) -> list[tuple[int, int, str]] | None:
        """(layer, 0 for its mixer or 1 for its feed-forward, option) for each layer that `ours` is about; None: it is about the model."""
        role, _, option = ours.partition(".")
        if role != "*" and role not in self.mixers and role not in self.ffns:
            return None
        having = [name for name, r in self.mixers.items() if _has(MIXERS[r.mixer][1](), option.split(".")[0]) and option not in r.fixed]
        names = having if role == "*" else [role]
        return [(i, part, option) for i, pair in enumerate(roles) for part in (0, 1) if pair[part] in names and (role != "*" or part == 0)]

    def _write(self, config: Config, k: Key, model: ModelConfig, specs: list[LayerSpec], roles: Roles) -> None:
        found: dict[int, Any] = {}  # layer -> our value; -1 is the model
        for ours in k.ours:
            places = self._places(ours, roles)
            if places is None:
                values = [(-1, _get(model, ours))]
            else:
                values = [(i, _of_layer(specs[i], part, option)) for i, part, option in places]
            for index, value in values:
                if found.setdefault(index, value) != value:
                    raise ConfigError(f"{self.model_type} has one {k.theirs} for {_options(k)}: make them equal")
        if not found:
            if k.default is not REQUIRED and k.theirs not in config:
                _put(config, k.theirs, k.default(config) if callable(k.default) else k.default)
            return
        theirs = {index: k.write(value, config) if k.write else value for index, value in found.items()}
        if k.per_layer:
            _put(config, k.theirs, [theirs.get(i, k.absent) for i in range(len(specs))])
            return
        first = next(iter(theirs.values()))
        if any(value != first for value in theirs.values()):
            raise ConfigError(f"{self.model_type} has one {k.theirs} for {_options(k)} of all layers: make them equal")
        _put(config, k.theirs, first)

    def _write_ropes(self, config: Config, specs: list[LayerSpec], roles: Roles, length: int) -> int:
        """rope_parameters; returns the longest sequence."""
        found: dict[str, tuple[Rope, Any, int]] = {}
        for spec, (mixer, _) in zip(specs, roles, strict=True):
            table = self.mixers[mixer].rope
            if table is None:
                continue
            options, width = _get(spec.options, table.at), _get(spec.options, table.width)
            if found.setdefault(table.layer_type, (table, options, width))[1] != options:
                raise ConfigError(f"{self.model_type} has one rope for all its {table.layer_type or 'attention'} layers: give each the same")
        for layer_type, (table, options, width) in found.items():
            parameters, length = rope.to_config(options, width, length, table.fraction is not None)
            _put(config, f"rope_parameters.{layer_type}" if layer_type else "rope_parameters", parameters)
        return length

    def _mixer(self, spec: LayerSpec) -> str:
        for name, role in self.mixers.items():
            fixed = {**MIXERS[role.mixer][2], **role.fixed}
            if MIXERS[role.mixer][0] == MIXERS[spec.mixer][0] and all(_fits(_of_layer(spec, 0, k), v) for k, v in fixed.items()):
                if role.rope is None or self._rotates(spec, name, role.rope):
                    return name
        raise ConfigError(f"{self.model_type} has no layer like model.layers.{spec.kind}: its kinds are {', '.join(self.mixers)}")

    def _rotates(self, spec: LayerSpec, name: str, table: Rope) -> bool:
        """Whether a layer rotates as its role does."""
        options, told = _get(spec.options, table.at), {f"{name}.{table.at}.pairs", f"*.{table.at}.pairs"}
        if options is None:
            return False
        return any(told & set(k.ours) for k in self.keys) or bool(options.pairs == table.pairs)

    def _ffn(self, spec: LayerSpec) -> str:
        for name, role in self.ffns.items():
            same = all(_plain(getattr(spec.ffn, k)) == v for k, v in role.fixed.items() if k not in _TRAINING)
            if same and bool(spec.ffn.experts) == (role.fixed.get("experts") != 0) and spec.ffn.absent == (role.fixed.get("inner") == 0):
                return name
        raise ConfigError(f"{self.model_type} has no feed-forward like that of {spec.kind}: its kinds are {', '.join(self.ffns)}")

    def _refuse_unknown(self, config: Config) -> None:
        if config.get("quantization_config"):
            raise ConfigError("the weights of this config.json are quantised (quantization_config): dequantise them first, with transformers")
        for name, value in self.constants.items():
            found = reduce(lambda part, parent: part.get(parent) if isinstance(part, dict) else None, name.split("."), config)  # type: ignore[arg-type, return-value]
            if found not in (None, value):
                raise ConfigError(f"{name} in config.json is {found!r}, and only {value!r} is supported for {self.model_type}")
        known = {
            *_INDIFFERENT,
            *self.rope_keys(),
            *self.constants,
            *self.role_names,
            *self.indifferent,
            *(name for k in self.keys for name in (k.theirs, *k.also)),
        }
        known |= {"num_hidden_layers"} | {name.split(".")[0] for name in known if "." in name}
        unknown = sorted(name for name, value in config.items() if name not in known and value not in (None, False, [], {}))
        if unknown:
            raise ConfigError(
                f"config.json of this {self.model_type} has {', '.join(unknown)}, not known to ltrain: take out what does not change the model"
            )

    def difference(self, a: ModelConfig, config: Config) -> str:
        """The first option by which a model computes differently from what a config.json describes, as written in the model, or ''."""
        b = self.to_model(config)
        named = b.shared
        b = dataclasses.replace(b, shared=dataclasses.replace(named, layer=a.shared.layer))  # a name of the model's own
        for f in dataclasses.fields(a):
            if f.name not in _NOT_COMPUTED and getattr(a, f.name) != getattr(b, f.name):
                return f"model.{f.name}={getattr(a, f.name)}"
        for one, other in zip(self._specs(a), self._specs(dataclasses.replace(b, shared=named)), strict=True):
            options, blocks = (self._computed(one), self._computed(other)), (dataclasses.asdict(one.block), dataclasses.asdict(other.block))
            for part, mine, theirs in (("", *options), ("ffn.", _feed_forward(one), _feed_forward(other)), ("block.", *blocks)):
                for name in mine:
                    if mine[name] != theirs.get(name):
                        return f"model.layers.{one.kind}.{part}{name}={mine[name]}"
        return ""

    def _computed(self, spec: LayerSpec) -> dict[str, Any]:
        options = {"mixer": MIXERS[spec.mixer][0], **_inferred(spec.options)}
        table = self.mixers[self._mixer(spec)].rope
        if table:
            _put(options, table.at, dataclasses.asdict(rope.settled(_get(spec.options, table.at), _get(spec.options, table.width))))
        return options


def _has(options: Any, name: str) -> bool:
    """Whether a mixer's layers have an option; `block` is every layer's."""
    return name == "block" or hasattr(options, name)


def _of_layer(spec: LayerSpec, part: int, option: str) -> Any:
    """An option of a layer's mixer (part 0), as in its layer kind, or feed-forward (part 1)."""
    if part == 0 and option.split(".")[0] == "block":
        return _get(spec, option)
    return _get(spec.ffn if part else spec.options, option)


def _fits(value: Any, fixed: Any) -> bool:
    """Whether an option is as a role fixes it; of a block, or of mixers side by side, only what it names."""
    if isinstance(value, (BlockOptions, Branch, dict)):
        return all(_fits(_get(value, name), v) for name, v in fixed.items())
    return bool(_plain(value) == fixed)


def _options(k: Key) -> str:
    return " and ".join(ours.removeprefix("*.") for ours in k.ours)


def _put(config: dict[str, Any], name: str, value: Any) -> None:
    """Set a value at a dotted name, or behind those of a list."""
    *parents, last = name.split(".")
    place: Any = config
    for parent, child in zip(parents, name.split(".")[1:], strict=True):
        place = place.setdefault(parent, [] if child.isdigit() else {})
    if isinstance(place, list):
        place[int(last) :] = [value]
    else:
        place[last] = value


def _get(part: Any, name: str) -> Any:
    """The field of a dataclass, or of those in it, at a dotted name; None in one that is None."""
    return reduce(_field, name.split("."), part)


def _field(part: Any, name: str) -> Any:
    if part is None or isinstance(part, dict):
        return part and part.get(name)
    # the options of a branch stand beside its own fields, as in a config
    return getattr(part.options if isinstance(part, Branch) and not hasattr(part, name) else part, name)


def _plain(value: Any) -> Any:
    """As a config says it: a dataclass by what it holds beyond its defaults."""
    return _differing(value, type(value)()) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _differing(options: Any, other: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from those of another of its kind."""
    theirs = dataclasses.asdict(other)
    return {name: value for name, value in dataclasses.asdict(options).items() if value != theirs[name]}


def _period(pattern: list[str]) -> list[str]:
    """The shortest start of the pattern that gives all of it when repeated."""
    return next(pattern[:n] for n in range(1, len(pattern) + 1) if all(kind == pattern[i % n] for i, kind in enumerate(pattern)))


def _feed_forward(spec: LayerSpec) -> dict[str, Any]:
    if spec.ffn.absent:
        return {"experts": 0, "inner": 0}
    if not spec.ffn.experts:
        return {name: getattr(spec.ffn, name) for name in ("experts", "inner", *(f.name for f in dataclasses.fields(FeedForwardOptions)))}
    return _inferred(spec.ffn)


def _inferred(options: Any) -> dict[str, Any]:
    """The options that inference reads."""
    found = {name: value for name, value in dataclasses.asdict(options).items() if name not in _TRAINING}
    if isinstance(options, ParallelOptions):
        scales = {name: {"in_scale": branch.in_scale, "out_scale": branch.out_scale} for name, branch in options.resolved()}
        found["branches"] = {name: {"mixer": MIXERS[b.mixer][0], **_inferred(b.options), **scales[name]} for name, b in options.resolved()}
    return found
