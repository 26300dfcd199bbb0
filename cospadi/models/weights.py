"""The tensors of a dense model by name: out of its memory, or read one by one from a folder of any size."""

import abc
import copy
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cospadi.errors import CheckpointError
from cospadi.formats import StoredTensor, read_headers


class Weights(abc.ABC):
    """Parameters and persistent buffers of a model, by the names of its modules, in the dtypes of the source."""

    @abc.abstractmethod
    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Give tensors, on the CPU or where the model is.

        Raises
        ------
        CheckpointError
            A tensor is missing, damaged or of another shape.
        """

    def __getitem__(self, name: str) -> Tensor:
        """Give one tensor."""
        return self.read([name])[name]


class ModelWeights(Weights):
    """The tensors of a model in memory.

    Parameters
    ----------
    model : Module
    dtypes : mapping of str to torch.dtype
        Those of the source, which calibration may have changed.
    """

    def __init__(self, model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
        self._model, self._dtypes = model, dtypes
        # What the model did not have when it was opened, such as the layers of experts, has the dtype of most.
        floating = Counter(dtype for dtype in dtypes.values() if dtype.is_floating_point)
        self._most = floating.most_common(1)[0][0]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Give tensors."""
        found = {}
        for name in names:
            module, _, own = name.rpartition(".")
            tensor = getattr(self._model.get_submodule(module), own).detach()
            other = self._most if tensor.is_floating_point() else tensor.dtype
            found[name] = tensor.to(self._dtypes.get(name, other))
        return found


class FolderWeights(Weights):
    """The tensors of a transformers folder, renamed and converted as transformers does when it loads the whole.

    Nothing but what is asked for is read, without mapping files into memory.

    Parameters
    ----------
    folder : Path
        Holds safetensors files.
    skeleton : PreTrainedModel
        The model on the meta device, as its class makes it: tells names, shapes and dtypes.

    Attributes
    ----------
    unused : tuple of str
        Stored tensors that the model has no place for, but for those that its class expects to be too many.

    Raises
    ------
    CheckpointError
        A file is missing, damaged or leaves the folder, or the model needs a tensor that no file holds.
    """

    def __init__(self, folder: Path, skeleton: Any) -> None:
        self.folder = folder
        self._stored = read_headers(folder)
        self._shapes = {name: (tuple(t.shape), t.dtype) for name, t in skeleton.state_dict().items()}
        self._sources: dict[str, _Source] = {}
        self._skeleton = skeleton
        self.unused = tuple(self._match(skeleton))
        self._twins = _twins(skeleton)
        self._check()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors; what several of them are made of is read once."""
        found: dict[str, Tensor] = {}
        made: dict[int, dict[str, Tensor]] = {}
        with _Files(self._stored) as files:
            for name in names:
                source = self._source(name)
                if source.converter is None:
                    tensor = files.read(source.keys[0][1])
                else:
                    if id(source) not in made:
                        made[id(source)] = source.convert(files, self._skeleton)
                    tensor = made[id(source)][self._own_name(name)]
                shape, dtype = self._shapes[name]
                if tuple(tensor.shape) != shape:
                    raise CheckpointError(
                        f"{self.folder}: tensor {name} has shape {tuple(tensor.shape)}, the config wants {shape}"
                    )
                found[name] = tensor.to(dtype)
        return found

    def _own_name(self, name: str) -> str:
        return name if name in self._sources else next(twin for twin in self._twins[name] if twin in self._sources)

    def _source(self, name: str) -> "_Source":
        for twin in (name, *self._twins.get(name, ())):
            if twin in self._sources:
                return self._sources[twin]
        raise CheckpointError(f"{self.folder}: the model needs tensor {name}, which no file holds")

    def _match(self, skeleton: Any) -> list[str]:
        """Find out which stored tensors each tensor of the model is made of, and which of none."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        transforms = get_model_conversion_mapping(skeleton)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix, wanted = skeleton.base_model_prefix, dict.fromkeys(self._shapes, True)
        unused = []
        for key in sorted(self._stored, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
            if target not in wanted and key in wanted:
                target, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
            if target not in wanted:
                unused.append(key)
                continue
            converter = None if pattern is None else by_pattern[pattern]
            source = self._sources.get(target)
            if source is None:
                source = self._sources[target] = _Source(target, converter)
                for other in [] if converter is None else converter.target_patterns[1:]:
                    assert converter is not None
                    self._sources[target.replace(converter.target_patterns[0], other)] = source
            source.keys.append((pattern or key, key))
        expected = [*(skeleton._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]  # of old versions
        return [key for key in unused if not any(re.search(pattern, key) for pattern in expected)]

    def _check(self) -> None:
        for name in self._shapes:
            source = self._source(name)
            for _, key in source.keys:
                if self._shapes[name][1].is_floating_point and not self._stored[key].dtype.is_floating_point:
                    raise CheckpointError(
                        f"{self._stored[key].file}: tensor {key} holds {self._stored[key].dtype}: this is a quantised "
                        "model: give the dense one"
                    )
            if source.converter is None:
                stored = self._stored[source.keys[0][1]]
                if stored.shape != self._shapes[name][0]:
                    raise CheckpointError(
                        f"{stored.file}: tensor {source.keys[0][1]} has shape {stored.shape}, the config wants "
                        f"{self._shapes[name][0]}"
                    )


class ExpertWeights(Weights):
    """Weights of a model whose fused experts were split into linear layers; see ``cospadi.models.experts``.

    Parameters
    ----------
    fused : Weights
        Of the model before the splitting.
    experts : sequence of str
        The modules that were split.
    """

    def __init__(self, fused: Weights, experts: Iterable[str]) -> None:
        self._fused = fused
        names = "|".join(re.escape(name) for name in experts)
        self._pattern = re.compile(rf"({names})\.(gate_up|down)\.(\d+)\.weight")
        self._last: dict[str, Tensor] = {}  # the fused tensor of the last expert that was asked for alone

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Give tensors; an expert's is a slice of the fused one."""
        names = list(names)
        slices = {name: found for name in names if (found := self._pattern.fullmatch(name))}
        whole = {name: f"{found[1]}.{found[2]}_proj" for name, found in slices.items()}
        if len(names) == 1 and whole:
            wanted = whole[names[0]]
            if wanted not in self._last:
                self._last = {}
                self._last = self._fused.read([wanted])
            read = self._last
        else:
            self._last = {}
            read = self._fused.read(dict.fromkeys(whole.get(name, name) for name in names))
        return {name: read[whole[name]][int(slices[name][3])] if name in whole else read[name] for name in names}


class _Source:
    """Stored tensors that become one tensor of the model, or several."""

    def __init__(self, target: str, converter: Any) -> None:
        self.target, self.converter = target, converter
        self.keys: list[tuple[str, str]] = []  # pattern, stored name

    def convert(self, files: "_Files", model: Any) -> dict[str, Tensor]:
        converter = copy.deepcopy(self.converter)
        assert converter is not None
        for pattern, key in self.keys:
            converter.add_tensor(self.target, key, pattern, files.read(key))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


class _Files:
    """Files that are open while tensors are read; they are read, not mapped, so that memory is what was asked for."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def read(self, key: str) -> Tensor:
        path = self._stored[key].file
        try:
            if path not in self._open:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt", backend="pread"))
            return self._open[path].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: tensor {key}: {error}") from error


def _twins(skeleton: nn.Module) -> dict[str, list[str]]:
    """Give for each tied tensor the other names of the same tensor."""
    names = defaultdict(list)
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {name: [n for n in same if n != name] for same in names.values() if len(same) > 1 for name in same}
