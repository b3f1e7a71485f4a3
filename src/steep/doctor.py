"""`steep doctor`: what is installed here, what the card can do, and what is missing, before a run finds out.

Everything is looked at and nothing is changed. Importing this loads nothing heavy; `examine` imports what steep needs,
one package after the other, and reports the one that breaks.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module, metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from steep.kernels import OLDEST_CARD
from steep.storage import cache_folder

# What each extra of steep is for. Its packages stand in the metadata of the installed steep.
EXTRAS = {
    "gguf": "base models in .gguf files, export --to gguf",
    "llama-cpp": "scoring a GGUF export with llama.cpp (compiles for minutes)",
    "report": "steep report",
    "tensorboard": "report_to: tensorboard",
}
# Packages that steep can use and no extra brings: what for, how to get them.
BESIDE = {
    "wandb": ("report_to: wandb", "pip install wandb"),
    "flash-attn": ("attn_implementation: flash_attention_2", "pip install flash-attn --no-build-isolation"),
    "triton": ("the fused step, torch.compile", "comes with the CUDA builds of torch"),
}
FUSED = "Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3, without DoRA and LoRA dropout (model.fused: auto)"
_MODULES = {"pyyaml": "yaml"}  # what a package is imported as, where that is not its name
_HUB_SECONDS = 4
_ROOMY = 20 * 2**30  # an 8B model in 16 bit takes 15 GiB


def examine(
    *,
    importer: Callable[[str], Any] = import_module,
    installed: Callable[[str], str] = metadata.version,
    requirements: Sequence[str] | None = None,
    variables: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """Look at everything that a run needs.

    Args:
        importer, installed, requirements, variables: where modules, versions, steep's own requirements and the
            environment come from; the tests plant faults there.

    Returns:
        Values that JSON can hold. ``findings`` lists what is wrong, each with ``kind`` (``broken``: steep cannot train;
        ``warning``: not as one might expect; ``note``), ``about``, ``problem`` and ``remedy``. ``can_train`` says
        whether nothing is broken, ``verdict`` the same in one line.
    """
    findings: list[dict[str, str]] = []

    def find(kind: str, about: str, problem: str, remedy: str) -> None:
        findings.append({"kind": kind, "about": about, "problem": problem, "remedy": remedy})

    own = [Requirement(text) for text in (metadata.requires("steep") or [] if requirements is None else requirements)]
    needed = [each for each in own if each.marker is None or each.marker.evaluate({"extra": ""})]
    python = _python(find)
    packages, modules = _packages(needed, importer, installed, find)
    device = _device(modules.get("torch"), find)
    four_bit = _four_bit(modules, device, find)
    optional = _optional(own, installed)
    cache = _cache(find)
    hub = _hub(modules.get("huggingface_hub"), variables, find)
    broken = dict.fromkeys(each["about"] for each in findings if each["kind"] == "broken")
    place = device["cards"][0]["name"] if device["cards"] else "the CPU (small models)"
    return {
        "steep": _version_of("steep", installed),
        "python": python,
        "platform": platform.platform(),
        "packages": packages,
        "device": device,
        "four_bit": four_bit,
        "fused": _fused(device, optional["triton"]["version"]),
        "optional": optional,
        "cache": cache,
        "hub": hub,
        "findings": findings,
        "can_train": not broken,
        "verdict": f"steep cannot train here; mend: {', '.join(broken)}"
        if broken
        else f"steep can train here, on {place}",
    }


def as_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report for a person: what is there, then what is wrong with its remedy, then the verdict."""
    device, hub, cache = report["device"], report["hub"], report["cache"]
    yield f"steep {report['steep']}, Python {report['python']}, {report['platform']}"
    yield ""
    for name, package in report["packages"].items():
        yield f"  {name:<18} {package['version'] or 'missing':<14} needs {package['needs'] or 'any version'}"
    yield ""
    for card in device["cards"]:
        memory = f"{card['memory_bytes'] / 2**30:.1f} GiB ({card['free_bytes'] / 2**30:.1f} free)"
        bf16 = "bf16" if card["bf16"] else "no bf16"
        yield f"card        {card['name']}, {memory}, compute capability {card['compute_capability']}, {bf16}"
    if not device["cards"]:
        yield "card        none that torch can use"
    yield f"CUDA        {device['cuda'] or 'none'} in torch, driver {device['driver'] or 'none'}"
    yield f"4 bit       {report['four_bit']}"
    yield f"fused step  {report['fused']['why']}"
    yield f"cache       {cache['folder']}, {cache['free_bytes'] / 2**30:.1f} GiB free"
    yield f"hub         {hub['state']}"
    yield ""
    for name, each in report["optional"].items():
        state = each["version"] or f"not installed; to get it: {each['install']}"
        yield f"  optional: {name} ({each['for']}): {state}"
    yield ""
    for each in report["findings"]:
        yield f"{each['kind']}: {each['about']}: {each['problem']}. {each['remedy']}"
    if report["findings"]:
        yield ""
    yield report["verdict"]


def _fused(device: Mapping[str, Any], triton: str | None) -> dict[str, Any]:
    """Whether `model.fused: auto` can fuse a step here, and which models, or why not."""
    reason, oldest = None, ".".join(map(str, OLDEST_CARD))
    if not device["cards"]:
        reason = "no: there is no GPU (model.fused: on computes in plain torch, to try it out)"
    elif tuple(map(int, device["cards"][0]["compute_capability"].split("."))) < OLDEST_CARD:
        reason = f"no: its kernels need compute capability {oldest}"
    elif triton is None:
        reason = "no: its kernels need triton"
    return {"used": reason is None, "why": reason or FUSED}


def _attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """What `function` returns, or in one line why it returns nothing.

    Catches every exception, here alone in steep: to find out what breaks, and how, is what is asked for; packages built
    for another machine raise anything from OSError to AttributeError when they are imported.
    """
    try:
        return function(*arguments), None
    except Exception as error:
        lines = str(error).strip().splitlines()
        return None, f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _version_of(name: str, installed: Callable[[str], str]) -> str | None:
    try:
        return installed(name)
    except metadata.PackageNotFoundError:
        return None


def _python(find: Callable[..., None]) -> str:
    here = platform.python_version()
    described, _ = _attempt(metadata.metadata, "steep")
    supported = (described or {}).get("Requires-Python")
    if supported and not SpecifierSet(supported).contains(here, prereleases=True):
        find("broken", "python", f"{here} is not among those supported ({supported})", "Use another Python.")
    return here


def _packages(
    needed: Sequence[Requirement],
    importer: Callable[[str], Any],
    installed: Callable[[str], str],
    find: Callable[..., None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Version and range of each package that steep needs, and the modules that could be imported."""
    packages: dict[str, Any] = {}
    modules: dict[str, Any] = {}
    if not needed:
        find("broken", "steep", "it is not installed, so what it needs is not known", "pip install steep")
    for each in needed:
        name, found = each.name, _version_of(each.name, installed)
        packages[name] = {"version": found, "needs": str(each.specifier), "imports": False}
        if found is None:
            find("broken", name, "it is not installed", f"pip install '{name}{each.specifier}'")
            continue
        if not each.specifier.contains(found, prereleases=True):
            find(
                "broken",
                name,
                f"{found} is outside the range that steep supports ({each.specifier})",
                f"pip install '{name}{each.specifier}'",
            )
        modules[name], reason = _attempt(importer, _MODULES.get(name, name))
        packages[name]["imports"] = reason is None
        if reason is not None:
            find("broken", name, f"it cannot be imported ({reason})", f"pip install --force-reinstall {name}")
    modules["huggingface_hub"], _ = _attempt(importer, "huggingface_hub")
    if all(package["imports"] for package in packages.values()):
        _, reason = _attempt(importer, "steep.run")  # loads the parts of the packages that a run uses
        if reason is not None:
            find("broken", "steep", f"its packages do not go together ({reason})", "pip install --upgrade steep")
    return packages, modules


def _device(torch: Any, find: Callable[..., None]) -> dict[str, Any]:
    """Cards that torch can use, and what stands in the way of others."""
    on_board, driver = _nvidia_smi()
    device: dict[str, Any] = {"cuda": None, "driver": driver, "on_board": on_board, "cards": []}
    if torch is None:
        return device
    device["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        device["cards"], reason = _attempt(_cards, torch)
        if reason is not None:
            device["cards"] = []
            find("broken", "card", f"torch cannot use it ({reason})", "See that no other process holds it: nvidia-smi")
    elif on_board and device["cuda"] is None:
        find(
            "warning",
            "torch",
            f"it was built without CUDA, and {on_board[0]} is there",
            "Install a build for CUDA: https://pytorch.org/get-started/locally",
        )
    elif on_board:
        find(
            "warning",
            "torch",
            f"it cannot use {on_board[0]} (CUDA {device['cuda']} in torch, driver {driver})",
            "Renew the driver, or install a torch for an older CUDA; unset CUDA_VISIBLE_DEVICES if it hides the card.",
        )
    else:
        find("note", "card", "no NVIDIA card is found", "Small models train on a CPU; others need a card.")
    for card in device["cards"]:
        if not card["built_for"]:
            find(
                "broken",
                "torch",
                f"its build has no code for {card['name']} (compute capability {card['compute_capability']})",
                "Install a newer build: https://pytorch.org/get-started/locally",
            )
        if not card["bf16"]:
            find("note", "card", f"{card['name']} has no bf16", "compute_dtype: auto takes fp16, with loss scaling.")
    if len(device["cards"]) > 1:
        find(
            "note",
            "card",
            f"there are {len(device['cards'])} cards",
            "The first is used; CUDA_VISIBLE_DEVICES chooses.",
        )
    return device


def _cards(torch: Any) -> list[dict[str, Any]]:
    cards = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        capability = (properties.major, properties.minor)
        cards.append(
            {
                "name": properties.name,
                "memory_bytes": total,
                "free_bytes": free,
                "compute_capability": f"{capability[0]}.{capability[1]}",
                "bf16": capability >= (8, 0),
                "built_for": _built_for(capability, torch.cuda.get_arch_list()),
            }
        )
    return cards


def _built_for(capability: tuple[int, int], built: Sequence[str]) -> bool:
    """Whether a torch with code for `built` (``sm_80``, ``compute_90``) runs on a card: machine code serves later cards
    of the same major version, PTX all later ones."""
    for entry in built:
        kind, _, digits = entry.partition("_")
        number = int("".join(each for each in digits if each.isdigit()) or 0)
        code = divmod(number, 10)
        if code <= capability and (kind == "compute" or code[0] == capability[0]):
            return True
    return not built


def _nvidia_smi() -> tuple[list[str], str | None]:
    """Names of the cards that the driver sees, and its version, torch or not."""
    if shutil.which("nvidia-smi") is None:
        return [], None
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return [], None
    rows = [line.rsplit(",", 1) for line in said.stdout.splitlines() if "," in line] if said.returncode == 0 else []
    return [name.strip() for name, _ in rows], rows[0][1].strip() if rows else None


def _four_bit(modules: Mapping[str, Any], device: Mapping[str, Any], find: Callable[..., None]) -> str:
    """Quantise a little in NF4, and make one step of the 8-bit optimizer, where a run would."""
    torch, library = modules.get("torch"), modules.get("bitsandbytes")
    if torch is None or library is None:
        return "not tried"
    place = "cuda" if device["cards"] else "cpu"
    _, reason = _attempt(_quantise_and_step, torch, library, place)
    if reason is None:
        return f"works on {place}, the 8-bit optimizer too"
    find(
        "broken",
        "bitsandbytes",
        f"it does not compute on {place} ({reason})",
        "`python -m bitsandbytes` says more; without it: model.base: bf16, training.optim: adamw_torch.",
    )
    return f"does not work on {place}"


def _quantise_and_step(torch: Any, library: Any, place: str) -> None:
    values = torch.linspace(-1, 1, 4096, device=place)
    codes, state = library.functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    error = float((library.functional.dequantize_4bit(codes, state) - values).abs().max())
    if not error < 0.2:  # half of NF4's widest gap is 0.15
        raise ArithmeticError(f"NF4 is off by {error}")
    weight = torch.nn.Parameter(torch.zeros(4096, device=place))
    weight.grad = torch.ones_like(weight)
    library.optim.AdamW8bit([weight], lr=0.1).step()
    if not bool((weight < 0).all()):
        raise ArithmeticError("the 8-bit optimizer moves nothing")


def _optional(own: Sequence[Requirement], installed: Callable[[str], str]) -> dict[str, Any]:
    """Packages that steep works without: version, purpose, how to get them."""
    wanted: dict[str, tuple[str, str]] = {}
    for extra, purpose in EXTRAS.items():
        for each in own:
            marker = each.marker
            if marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
                wanted[each.name] = (purpose, f"pip install 'steep[{extra}]'")
    optional = {}
    for name, (purpose, how) in (wanted | BESIDE).items():
        optional[name] = {"version": _version_of(name, installed), "for": purpose, "install": how}
    return optional


def _cache(find: Callable[..., None]) -> dict[str, Any]:
    """The cache of tokenised text and converted models, and the room on its disk."""
    folder = place = cache_folder().absolute()
    while not place.exists():
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        find("broken", "cache", f"{folder} cannot be written into", "Set STEEP_CACHE to a folder that you may write.")
    free = shutil.disk_usage(place).free
    if free < _ROOMY:
        problem = f"{free / 2**30:.1f} GiB are free where {folder} is; an 8B model in 16 bit takes 15"
        find("warning", "cache", problem, "Make room, or set STEEP_CACHE to another disk.")
    return {"folder": str(folder), "free_bytes": free}


def _hub(hub: Any, variables: Mapping[str, str], find: Callable[..., None]) -> dict[str, Any]:
    """Whether models can be fetched by name."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    off = [name for name in names if variables.get(name, "").upper() in ("1", "TRUE", "YES", "ON")]
    if off:
        find("note", "hub", f"it is off ({off[0]})", "Only models and data that are here already are found.")
        return {"state": f"off ({off[0]})", "endpoint": None}
    if hub is None:
        return {"state": "not tried", "endpoint": None}
    endpoint = hub.constants.ENDPOINT
    reason = _ask(lambda: hub.get_session().head(endpoint, timeout=_HUB_SECONDS))
    if reason is not None:
        find("note", "hub", f"{endpoint} cannot be reached ({reason})", "Give models and data as local folders.")
        return {"state": f"not reachable: {endpoint}", "endpoint": endpoint}
    return {"state": f"reachable: {endpoint}", "endpoint": endpoint}


def _ask(request: Callable[[], Any]) -> str | None:
    """Why `request` fails, or None. In a thread of its own: looking up a name may take longer than any timeout says."""
    said: list[str | None] = []
    thread = threading.Thread(target=lambda: said.append(_attempt(request)[1]), daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS + 1)
    return said[0] if said else f"no answer in {_HUB_SECONDS + 1} s"
