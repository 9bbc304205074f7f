"""SGLang and vLLM servers as ``InferenceEngine``: sampling, new weights, pause, abort, over their own endpoints.

How new weights get in, whoever else samples meanwhile::

    drain: close the gate, wait for what this object has in flight          (mode "drain" only)
    pause the server: nothing is sampled                                    ("abort": what is in flight ends)
    weights: from a folder, or over gloo from the trainer's memory
    forget cached text; what is in flight computes its keys and values anew
    continue, open the gate                                                 (also when anything before failed)

Without the pause a request could be answered by half of each, and without the flush by new weights on the keys and
values of old ones, which SGLang and vLLM both find in their prefix caches.
"""

from __future__ import annotations

import hashlib
import socket
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import httpx

from rollouts.errors import RunError, UserError
from rollouts.inference.protocol import PauseMode, UpdateMode
from rollouts.inference.sampling_params import SamplingParams
from rollouts.providers import Endpoint, ProviderError, connect, sample_tokens
from rollouts.providers.http import request_json, run_all
from rollouts.providers.token_dialects import version_number
from rollouts.training.rollout_gen.concurrency import call
from rollouts.training.weight_push import WeightGroup, buckets, named_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rollouts.inference.completion import Completion

HEALTH_SECONDS = 20.0  # for an answer of a server that lives
POLL_SECONDS = 1.0
ADAPTER_CONFIG = "adapter_config.json"  # what tells a folder with an adapter alone
ADAPTER_NAME = "rollouts"  # of the adapter in vLLM


class WeightSyncError(RunError):
    """New weights did not arrive, or others than were sent."""


class RemoteEngine(ABC):
    """What SGLang's and vLLM's engines share.

    Args:
        base_url: the server's address.
        api_key: the bearer token it wants, if any.
        timeout: seconds for an answer, and for each step of a weight update.
        max_retries: of requests that fail, as in ``Endpoint``.
        push_address: this machine's address as the server sees it, for weights sent over gloo; None finds it out.
    """

    provider: str

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 4,
        push_address: str | None = None,
    ) -> None:
        self.base_url = base_url
        self.endpoint = Endpoint(
            self.provider,  # type: ignore[arg-type]
            model,
            base_url,
            api_key=api_key,
            timeout=timeout,
            max_retries=max_retries,
        )
        self.push_address = push_address
        self._group: WeightGroup | None = None
        self._updating = anyio.Lock()
        self._in_flight = 0
        self._gate = anyio.Condition()
        self._gate_open = True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_url!r})"

    # -- sampling -----------------------------------------------------------------------------------------------------

    async def connect(self, *, tempered: bool = True) -> None:
        """Check that the server answers and that its log-probs can be trained on. Raises ProviderError."""
        await connect(self.endpoint, tempered=tempered)

    async def generate_group(self, prompt_ids: Sequence[int], params: SamplingParams | None = None) -> list[Completion]:
        """The samples of one prompt. Raises UserError (refused), ProviderError (the server failed)."""
        async with self._gate:
            while not self._gate_open:
                await self._gate.wait()
            self._in_flight += 1
        try:
            return await sample_tokens(self.endpoint, prompt_ids, params or SamplingParams())
        finally:
            self._in_flight -= 1
            with anyio.CancelScope(shield=True):
                async with self._gate:
                    self._gate.notify_all()

    async def take_over(self) -> None:
        """Resume a server that another trainer has paused, perhaps in the middle of an update, and died.

        Its weights are unknown afterwards. Raises ProviderError: it does not answer.
        """
        with suppress(UserError, ProviderError, WeightSyncError):  # no update is open
            await self._end_push(0)
        await self.continue_generation()

    async def aclose(self) -> None:
        """Leave the group in which weights are pushed, at both ends; the next push would meet in a new one."""
        if self._group is not None:
            name = self._group.name
            self._leave_group()
            with anyio.move_on_after(HEALTH_SECONDS, shield=True), suppress(ProviderError, UserError):
                await self._dismiss(name)

    async def reconnect(self) -> None:
        """Wait until a server that failed answers again at its address, as if it had been started anew.

        Raises:
            ProviderError: it did not within ``timeout`` seconds.
        """
        self._leave_group()
        self._forget_adapter()
        with anyio.move_on_after(self.endpoint.timeout):
            while not await self.is_healthy():
                await anyio.sleep(POLL_SECONDS)
            return
        raise ProviderError(f"{self!r} is not back after {self.endpoint.timeout:g} s")

    async def is_healthy(self) -> bool:
        """Whether the server samples, within 20 s; of a paused one whether it answers."""
        try:
            await self._check_health()
        except (ProviderError, UserError):
            return False
        return True

    # -- weights ------------------------------------------------------------------------------------------------------

    async def update_weights_from_checkpoint(
        self, folder: str | Path, version: int | None = None, mode: UpdateMode = "drain"
    ) -> int:
        """Serve the weights in a folder that the server can read; a LoRA adapter alone goes on top of the base model.

        Raises:
            UserError: the folder is none.
            WeightSyncError: the server refused them or failed.
        """
        path = Path(folder).resolve()
        if not path.is_dir():
            raise UserError(f"{folder} is not a folder; give one with a model's config and safetensors")
        load = self._load_adapter if (path / ADAPTER_CONFIG).is_file() else self._load_folder
        return await self._update(partial(load, path), version, mode)

    async def update_weights(
        self,
        weights: Mapping[str, torch.Tensor] | nn.Module | None = None,
        version: int | None = None,
        mode: UpdateMode = "drain",
    ) -> int:
        """Send weights out of this process's memory, over gloo.

        Raises:
            UserError: no weights are given, or those of a model with an adapter on it.
            WeightSyncError: the server refused them or failed; it must be given weights again before it serves.
        """
        if weights is None:
            raise UserError(f"{self!r} shares no memory with the trainer; give it the weights, or a folder of them")
        tensors = named_tensors(weights)
        if any(name.startswith("base_model.") for name in tensors):
            raise UserError(
                "a model with an adapter cannot be pushed; save the adapter and give its folder, or merge it first"
            )
        return await self._update(partial(self._push, tensors), version, mode)

    async def _update(self, load: Any, version: int | None, mode: UpdateMode) -> int:
        if mode not in ("drain", "continue", "abort"):
            raise UserError(f"weight update mode {mode!r} is unknown; use drain, continue or abort")
        async with self._updating:
            try:
                if mode == "drain":
                    await self._close_gate()
                new = await self.get_weight_version() + 1 if version is None else version
                try:
                    await self.pause_generation("abort" if mode == "abort" else "keep")
                    await load(new)
                    await self.flush_cache()
                except BaseException:
                    with anyio.move_on_after(HEALTH_SECONDS, shield=True), suppress(ProviderError, UserError):
                        await self.continue_generation()
                    raise
                with anyio.CancelScope(shield=True):
                    await self.continue_generation()
            except ProviderError as error:
                raise WeightSyncError(f"{self!r} took no weights: {error}") from error
            finally:
                with anyio.CancelScope(shield=True):
                    async with self._gate:
                        self._gate_open = True
                        self._gate.notify_all()
        return new

    async def _close_gate(self) -> None:
        async with self._gate:
            self._gate_open = False
            while self._in_flight:
                await self._gate.wait()

    async def _push(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        """Send tensors in buckets; the server receives each while this process sends it."""
        try:
            if self._group is None:
                address = self.push_address or address_towards(self.base_url)
                self._group = WeightGroup(address, await self._num_workers(), self.endpoint.timeout)
                await self._together(partial(self._invite, self._group), self._group.join)
            group = self._group
            await self._begin_push()
            for bucket in buckets(tensors):
                send = partial(group.send, list(bucket.values()))
                await self._together(partial(self._receive, bucket, version), send)
            await self._end_push(version)
        except BaseException:
            self._leave_group()  # its other end may be anywhere
            raise

    def _leave_group(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    async def _together(self, ask: Any, work: Any) -> None:
        """Await the server's answer while a thread of this process does its part.

        When the server refuses, the thread waits in vain until its time is up, and nobody for it.
        """

        async def in_thread() -> None:
            try:
                await call(work)
            except RuntimeError as error:
                raise WeightSyncError(f"{self!r} took no part in the push: {error}") from error

        await run_all([ask, in_thread])

    async def _post(self, path: str, body: Mapping[str, Any] | None = None, **options: Any) -> Any:
        return await request_json(self.endpoint, "POST", path, body, **{"max_retries": 1, **options})

    async def _get(self, path: str, **options: Any) -> Any:
        return await request_json(self.endpoint, "GET", path, **options)

    # -- in each server's own words -----------------------------------------------------------------------------------

    @abstractmethod
    async def get_weight_version(self) -> int: ...

    @abstractmethod
    async def get_weights_checksum(self) -> str: ...

    @abstractmethod
    async def get_weights_digests(self) -> dict[str, str]:
        """SHA-256 by tensor, of those that the server shows as they are; empty where it shows none."""

    @abstractmethod
    async def pause_generation(self, mode: PauseMode = "keep") -> None: ...

    @abstractmethod
    async def continue_generation(self) -> None: ...

    @abstractmethod
    async def abort_all(self) -> None: ...

    @abstractmethod
    async def flush_cache(self) -> None:
        """Forget cached text. In a paused server what is in flight forgets too, and is computed anew."""

    @abstractmethod
    async def _check_health(self) -> None: ...

    @abstractmethod
    async def _load_folder(self, folder: Path, version: int) -> None: ...

    @abstractmethod
    async def _load_adapter(self, folder: Path, version: int) -> None:
        """Load a LoRA adapter alone, and sample with it from then on."""

    @abstractmethod
    async def takes_adapters(self) -> bool:
        """Whether the server was started so that it takes LoRA adapters alone."""

    @abstractmethod
    async def takes_pushes(self) -> bool:
        """Whether weights can be sent out of memory."""

    @abstractmethod
    def _forget_adapter(self) -> None:
        """A server that starts anew has none."""

    @abstractmethod
    async def _num_workers(self) -> int: ...

    @abstractmethod
    async def _invite(self, group: WeightGroup) -> None: ...

    @abstractmethod
    async def _dismiss(self, group: str) -> None:
        """Have the server leave a group."""

    @abstractmethod
    async def _begin_push(self) -> None: ...

    @abstractmethod
    async def _receive(self, bucket: Mapping[str, torch.Tensor], version: int) -> None: ...

    @abstractmethod
    async def _end_push(self, version: int) -> None: ...


class SGLangEngine(RemoteEngine):
    """An SGLang server (with ``--enable-lora`` for adapters), or `rollouts serve`: see ``RolloutsEngine``."""

    provider = "sglang"

    def __init__(self, base_url: str = "http://localhost:30000", model: str = "default", **options: Any) -> None:
        super().__init__(base_url, model, **options)
        self._paused = False
        self._adapter: str | None = None

    async def get_weight_version(self) -> int:
        return version_number((await self._get("/model_info"))["weight_version"])

    async def get_weights_checksum(self) -> str:
        answer = await self._post("/weights_checker", {"action": "checksum"})
        return answer.get("checksum") or answer["per_engine_checksum"]

    async def get_weights_digests(self) -> dict[str, str]:
        answer = await self._post("/weights_checker", {"action": "checksum"})
        ranks: list[Any] = answer.get("ranks") or []
        digests = dict(ranks[0]["checksums"]) if len(ranks) == 1 else {}
        if any(len(value) < 64 for value in digests.values()):  # SGLang's: SHA-256 on a CPU, something else on a GPU
            if (await self._get("/server_info")).get("device") != "cpu":
                return {}
        return digests

    async def pause_generation(self, mode: PauseMode = "keep") -> None:
        self._paused = True  # perhaps, even if no answer comes
        await self._post("/pause_generation", {"mode": "abort" if mode == "abort" else "retract"})

    async def continue_generation(self) -> None:
        await self._post("/continue_generation", {})
        self._paused = False

    async def abort_all(self) -> None:
        await self._post("/abort_request", {"abort_all": True})

    async def flush_cache(self) -> None:
        await self._post("/flush_cache", {})

    async def _check_health(self) -> None:
        await self._get("/health" if self._paused else "/health_generate", timeout=HEALTH_SECONDS, max_retries=0)

    async def _load_folder(self, folder: Path, version: int) -> None:
        self._expect(
            await self._post("/update_weights_from_disk", {"model_path": str(folder), "weight_version": str(version)})
        )

    async def _load_adapter(self, folder: Path, version: int) -> None:
        name = f"rollouts_{version}_{uuid.uuid4().hex[:8]}"  # a name is loaded once
        self._expect(
            await self._post("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, max_retries=0)
        )
        if self._adapter is not None:
            self._expect(await self._post("/unload_lora_adapter", {"lora_name": self._adapter}, max_retries=0))
        self._adapter = name
        self.endpoint = replace(self.endpoint, extra_params={**(self.endpoint.extra_params or {}), "lora_path": name})
        await self._post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    async def takes_adapters(self) -> bool:
        return bool((await self._server_info()).get("enable_lora"))

    async def takes_pushes(self) -> bool:
        return True

    def _forget_adapter(self) -> None:
        self._adapter = None
        others = {name: value for name, value in (self.endpoint.extra_params or {}).items() if name != "lora_path"}
        self.endpoint = replace(self.endpoint, extra_params=others)

    async def _num_workers(self) -> int:
        info = await self._server_info()
        return int(info.get("tp_size", 1)) * int(info.get("pp_size", 1))

    async def _server_info(self) -> dict[str, Any]:
        try:
            return await self._get("/server_info")
        except UserError:  # 404: `rollouts serve`, which is one process and takes no adapters
            return {}

    async def _invite(self, group: WeightGroup) -> None:
        self._expect(
            await self._post(
                "/init_weights_update_group",
                {
                    "master_address": group.address,
                    "master_port": group.port,
                    "rank_offset": 1,
                    "world_size": group.world_size,
                    "group_name": group.name,
                    "backend": "gloo",
                },
                max_retries=0,
            )
        )

    async def _dismiss(self, group: str) -> None:
        await self._post("/destroy_weights_update_group", {"group_name": group})

    async def _begin_push(self) -> None:
        try:
            self._expect(await self._post("/begin_weight_update", {}, max_retries=0))
        except ProviderError:  # a push that broke off has left its session open
            await self._end_push(0)
            self._expect(await self._post("/begin_weight_update", {}, max_retries=0))

    async def _receive(self, bucket: Mapping[str, torch.Tensor], version: int) -> None:
        assert self._group is not None
        names, dtypes, shapes = describe(bucket)
        body = {"names": names, "dtypes": dtypes, "shapes": shapes, "group_name": self._group.name}
        body |= {"weight_version": str(version), "flush_cache": False}
        self._expect(await self._post("/update_weights_from_distributed", body, max_retries=0))

    async def _end_push(self, version: int) -> None:
        self._expect(await self._post("/end_weight_update", {}, max_retries=0))

    def _expect(self, answer: Any) -> None:
        if not (isinstance(answer, dict) and answer.get("success")):
            message = answer.get("message") if isinstance(answer, dict) else answer
            raise WeightSyncError(f"{self!r}: {message}")


class RolloutsEngine(SGLangEngine):
    """`rollouts serve`, which is asked as SGLang is, and has its own name in messages."""


class VLLMEngine(RemoteEngine):
    """A vLLM server, started with VLLM_SERVER_DEV_MODE=1 and ``--enable-scale-out``.

    Pushes need this package in vLLM's environment and ``--weight-transfer-config '{"backend": "gloo"}'``; adapters need
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and ``--enable-lora``.

    Args:
        model: the name that the server knows it by; None = the first that it lists.
        plugin: whether this package's transport is there, which also makes tied output layers follow weights from a
            folder on a CPU; None asks the server.
    """

    provider = "vllm"

    def __init__(
        self,
        base_url: str = "http://localhost:8000",
        model: str | None = None,
        *,
        plugin: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(base_url, model or "", **options)
        self._plugin = plugin

    async def connect(self, *, tempered: bool = True) -> None:
        await self._find_model()
        await super().connect(tempered=tempered)

    async def generate_group(self, prompt_ids: Sequence[int], params: SamplingParams | None = None) -> list[Completion]:
        if not self.endpoint.model:
            await self._find_model()
        return await super().generate_group(prompt_ids, params)

    async def _find_model(self) -> None:
        if not self.endpoint.model:
            models = (await self._get("/v1/models"))["data"]
            self.endpoint = replace(self.endpoint, model=models[0]["id"])

    async def get_weight_version(self) -> int:
        return version_number((await self._get("/weight_info"))["weight_version"])

    async def get_weights_checksum(self) -> str:
        checksums = (await self._post("/weight_checker", {"action": "checksum"}))["checksums"]
        lines = "".join(f"{name} {value}\n" for name, value in sorted(checksums.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    async def get_weights_digests(self) -> dict[str, str]:
        checksums = (await self._post("/weight_checker", {"action": "checksum"}))["checksums"]
        if len({name.rpartition(":")[0] for name in checksums}) != 1:  # dp0:pp0:pcp0:tp0:name, one prefix a worker
            return {}
        return {name.rpartition(":")[2]: value for name, value in checksums.items()}

    async def pause_generation(self, mode: PauseMode = "keep") -> None:
        await self._post(f"/pause?mode={mode}")

    async def continue_generation(self) -> None:
        await self._post("/resume")

    async def abort_all(self) -> None:
        await self._post("/abort_requests", {})

    async def flush_cache(self) -> None:
        await self._post("/reset_prefix_cache?reset_running_requests=true")

    async def _check_health(self) -> None:
        await self._get("/health", timeout=HEALTH_SECONDS, max_retries=0)

    async def _load_folder(self, folder: Path, version: int) -> None:
        if await self._has_plugin():
            await self._begin_push()
            await self._post("/update_weights", {"update_info": {"folder": str(folder)}}, max_retries=0)
            await self._end_push(version)
            return
        arguments = {"weights_path": str(folder)}
        await self._post("/collective_rpc", {"method": "reload_weights", "kwargs": arguments}, max_retries=0)
        await self._post("/update_weight_version", {"new_version": str(version)})

    async def _load_adapter(self, folder: Path, version: int) -> None:
        body = {"lora_name": ADAPTER_NAME, "lora_path": str(folder), "load_inplace": True}
        await self._post("/v1/load_lora_adapter", body, max_retries=0)
        await self._post("/update_weight_version", {"new_version": str(version)})
        self.endpoint = replace(self.endpoint, model=ADAPTER_NAME)  # as vLLM names who is asked

    async def takes_adapters(self) -> bool:
        if not (await self._config()).get("lora_config"):
            return False
        return "/v1/load_lora_adapter" in (await self._get("/openapi.json"))["paths"]

    async def takes_pushes(self) -> bool:
        return await self._has_plugin()

    def _forget_adapter(self) -> None:
        if self.endpoint.model == ADAPTER_NAME:
            self.endpoint = replace(self.endpoint, model="")  # the server's own, which is asked for

    async def _has_plugin(self) -> bool:
        if self._plugin is None:
            config = (await self._config()).get("weight_transfer_config")
            self._plugin = isinstance(config, dict) and config.get("backend") == "gloo"
        return self._plugin

    async def _config(self) -> dict[str, Any]:
        return (await self._get("/server_info?config_format=json")).get("vllm_config") or {}

    async def _num_workers(self) -> int:
        return int((await self._get("/get_world_size"))["world_size"])

    async def _invite(self, group: WeightGroup) -> None:
        info = {
            "address": group.address,
            "port": group.port,
            "world_size": group.world_size,
            "name": group.name,
            "timeout": group.timeout,
        }
        await self._post("/init_weight_transfer_engine", {"init_info": info}, max_retries=0)

    async def _dismiss(self, group: str) -> None:
        """It leaves when it is invited to the next."""

    async def _begin_push(self) -> None:
        try:
            await self._post("/start_weight_update", max_retries=0)
        except ProviderError:  # an update that broke off has left its session open
            await self._end_push(0)
            await self._post("/start_weight_update", max_retries=0)

    async def _receive(self, bucket: Mapping[str, torch.Tensor], version: int) -> None:
        names, dtypes, shapes = describe(bucket)
        update = {"names": names, "dtype_names": dtypes, "shapes": shapes}
        await self._post("/update_weights", {"update_info": update}, max_retries=0)

    async def _end_push(self, version: int) -> None:
        await self._post("/finish_weight_update", {"weight_version": str(version)}, max_retries=0)


def address_towards(url: str) -> str:
    """This machine's address on the way to a server. Raises WeightSyncError: the server's name is unknown."""
    where = httpx.URL(url)
    try:
        family, kind, *_, target = socket.getaddrinfo(where.host, where.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # of a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
    except OSError as error:
        raise WeightSyncError(f"cannot find the way to {url}: {error}") from error


def describe(bucket: Mapping[str, torch.Tensor]) -> tuple[list[str], list[str], list[list[int]]]:
    """Names, dtypes and shapes of tensors, as both servers take them."""
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in bucket.values()]
    return list(bucket), dtypes, [list(tensor.shape) for tensor in bucket.values()]
