"""The plugin's hooks, as Axolotl calls them. Axolotl is not installed here: it pins other versions of everything."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from support.trainers import sft_trainer

from loraone_init.errors import ConfigError


class Config(dict):
    """As Axolotl's own: keys are attributes too, and those that are not there are None."""

    def __getattr__(self, name):
        return self.get(name)

    def __missing__(self, name):
        return None


@pytest.fixture
def plugin(monkeypatch):
    """An instance, on a base class that does nothing, as all hooks of Axolotl's do."""
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    for name in [name for name in sys.modules if name.startswith("loraone_init.axolotl")]:
        monkeypatch.delitem(sys.modules, name)
    from loraone_init.axolotl import LoraOnePlugin

    yield LoraOnePlugin()
    for name in [name for name in sys.modules if name.startswith("loraone_init.axolotl")]:
        del sys.modules[name]


def configured(plugin, **keys):
    """The configuration as a plugin gets it: unparsed at first, then with the defaults of its arguments."""
    from loraone_init.axolotl import LoraOneArgs

    cfg = Config({"adapter": "lora"} | keys)
    plugin.register(cfg)
    assert plugin.get_input_args() == f"{LoraOneArgs.__module__.rpartition('.')[0]}.{LoraOneArgs.__name__}"
    return Config(cfg | LoraOneArgs(**{key: cfg[key] for key in cfg if key.startswith("loraone_")}).model_dump())


@pytest.mark.filterwarnings("ignore")
def test_a_training_starts_with_the_step(plugin, tmp_path):
    cfg = configured(plugin, loraone_samples=6, loraone_gamma=64)
    plugin.pre_model_load(cfg)
    assert cfg["lora_qkv_kernel"] is False
    trainer = sft_trainer(tmp_path, [], max_steps=1)
    (callback,) = plugin.add_callbacks_post_trainer(cfg, trainer)
    assert (callback.samples, callback.gamma, callback.optimizer) == (6, 64, True)
    trainer.add_callback(callback)
    trainer.train()
    assert trainer.state.log_history[0]["loraone/gamma"] == 64


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"adapter": None}, "adapter: lora"),
        ({"lora_model_dir": "out"}, "lora_model_dir"),
        ({"rl": "dpo"}, "supervised fine-tuning"),
        ({"sample_packing": True}, "sample_packing: false"),
        ({"lora_mlp_kernel": True}, "lora_mlp_kernel read weights"),
    ],
)
def test_settings_that_are_refused(plugin, keys, told):
    with pytest.raises(ConfigError, match=told):
        plugin.pre_model_load(configured(plugin, **keys))


def test_keys_of_the_yaml_are_checked(plugin):
    with pytest.raises(ValueError, match="loraone_gamma"):
        configured(plugin, loraone_gamma="most")
