from omegaconf import OmegaConf

from lavis_kvmod.system.secrets import without_secrets


def test_what_comes_from_the_environment_is_not_written(monkeypatch):
    monkeypatch.setenv("TOKEN", "hf_secret")
    config = OmegaConf.create(
        {
            "a": "${oc.env:TOKEN}",
            "b": "${a}",
            "url": "https://me:${oc.env:TOKEN,none}@host",
            "n": "${lr}",
            "lr": 0.1,
            "all": ["${b}", "${lr}"],
        }
    )
    written = without_secrets(config)
    assert written == {
        "a": "${oc.env:TOKEN}",
        "b": "${a}",
        "url": "https://me:${oc.env:TOKEN,none}@host",
        "n": 0.1,
        "lr": 0.1,
        "all": ["${b}", 0.1],
    }
    assert config.b == "hf_secret"  # and is there for who needs it
    assert OmegaConf.create(written).b == "hf_secret"
