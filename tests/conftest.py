"""Small real models: LAVIS's own classes and real files, at a geometry that runs in milliseconds."""

import gc
import logging
import os

# Before torch is imported: where there is a GPU the tests see none, and so are the same everywhere (and may fork, which
# a process that has used a GPU must not). Those of tests/gpu ask for it, with `make test-gpu`.
if os.environ.get("LAVIS_KVMOD_TEST_DEVICE") != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTForCausalLM
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
from omegaconf import OmegaConf
from safetensors.torch import save_file
from small_vit import SIZE, VIT, small_vit
from tokenizers import ByteLevelBPETokenizer
from torch import nn

from lavis_kvmod import Blip2OPTKVMod
from lavis_kvmod.system.allocator import keep_freed_memory

# These models are too small to share out: threads would only wait for each other, and for whatever else runs.
torch.set_num_threads(1)
keep_freed_memory()  # as a run on the CPU does

# PyTorch replaces its thread pool at the first use after a fork, not safely when several of autograd's threads do it
# at once ("Invalid thread pool!", and the child aborts). So every child of a test uses it once before.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))

# Files that take long, for their number of tests: in a whole run they are begun first, so that none of them is what all
# processes but one wait for at the end. Before the last three, which compute memory, come those that fork a training:
# PyTorch refuses a backward pass in a fork of a process that has had one for a GPU, be it a fake one.
LONG = ("test_install", "test_processes", "test_resume", "test_signals", "test_sharding", "test_run_folder")
LONG += ("test_run_file", "test_runs", "test_train", "test_benchmarks", "test_promises", "test_own_files_end_to_end")
LONG += ("test_evaluation", "test_blip2_opt_kvmod", "test_blip2_kvmod_ranks", "test_matrix", "test_params")
LONG += ("test_convert", "test_evaluate", "test_hook", "test_estimate", "test_memory", "test_doctor")


def pytest_configure(config):
    """pytest-xdist would begin with the files of the most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_finish():
    """What has been imported by now stays: the collector need not look through it again and again (8 % of the time)."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


QFORMER = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
QUERIES = 5
TEXTS = [
    "Question: which digit is written Short answer: seven\n",
    "Question: what colour is the ink Short answer: red\n",
    "Question: is the digit even Short answer: yes\n",
    "a photo of a cat on a mat\n",
]


@pytest.fixture(scope="session")
def opt_folder(tmp_path_factory):
    """A Hugging Face folder with a small random OPT and a byte-level BPE tokenizer like OPT's."""
    folder = tmp_path_factory.mktemp("opt")
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe.train_from_iterator(TEXTS, vocab_size=400, min_frequency=1, special_tokens=special)
    bpe.save_model(str(folder))
    from transformers import GPT2Tokenizer

    GPT2Tokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=128,
        init_std=0.2,  # far from flat, so that beams and answers differ
        dropout=0.1,
    )
    # LAVIS always loads OPT in fp16: numbers that fp16 holds exactly make both loaders give the same weights.
    OPTForCausalLM(config).half().float().save_pretrained(folder)
    return folder


class SmallBlip2OPT(Blip2OPT):
    """LAVIS's Blip2OPT, its forward and generate untouched, assembled at small geometry."""

    @classmethod
    def init_tokenizer(cls):
        return None  # BERT's, which the OPT path never uses

    @classmethod
    def init_vision_encoder(cls, *args):
        vit = small_vit()
        return vit, LayerNorm(vit.num_features)

    @classmethod
    def init_Qformer(cls, num_query_token, vision_width, cross_attention_freq=2):
        config = BertConfig(vocab_size=50, **QFORMER)
        config.encoder_width = vision_width
        config.add_cross_attention = True
        config.cross_attention_freq = cross_attention_freq
        config.query_length = num_query_token
        tokens = nn.Parameter(torch.randn(1, num_query_token, config.hidden_size) * 0.02)
        return BertLMHeadModel(config), tokens


@pytest.fixture(scope="session")
def files(tmp_path_factory, opt_folder):
    """Weight files as users have them: a ViT, a stock BLIP-2 checkpoint, an EfficientNet-B0, an OPT folder."""
    from efficientnet_pytorch import EfficientNet

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    stock = SmallBlip2OPT(opt_model=str(opt_folder), num_query_token=QUERIES)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if not name.startswith("opt_model."):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    state = stock.state_dict()
    vit = {k[len("visual_encoder.") :]: v for k, v in state.items() if k.startswith("visual_encoder.")}
    torch.save(vit, folder / "eva_vit.pth")
    trained = {k: v for k, v in state.items() if not k.startswith(("visual_encoder.", "opt_model."))}
    torch.save({"model": trained}, folder / "blip2.pth")
    b0 = EfficientNet.from_name("efficientnet-b0")
    for module in b0.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics of what it sees, or random weights fade to nothing
    with torch.no_grad():
        b0.train()(torch.randn(8, 3, 64, 64))
    save_file(b0.state_dict(), folder / "b0.safetensors")  # read by nearly every test, and ten times as fast
    return SimpleNamespace(
        vit=folder / "eva_vit.pth",
        blip2=folder / "blip2.pth",
        b0=folder / "b0.safetensors",
        opt=opt_folder,
    )


@pytest.fixture(scope="session")
def model_config(files):
    """A function: the ``model:`` section of a small model from those files, with overrides."""

    def make(**overrides):
        return OmegaConf.create(
            {
                "arch": "blip2_opt_kvmod",
                "load_finetuned": False,
                "pretrained": str(files.blip2),
                "image_size": SIZE,
                "vit_checkpoint": str(files.vit),
                "vit_geometry": VIT,
                "vit_precision": "fp32",
                "qformer_geometry": QFORMER,
                "num_query_token": QUERIES,
                "opt_model": str(files.opt),
                "opt_precision": "fp32",
                "aux_encoder": "efficientnet-b0",
                "aux_checkpoint": str(files.b0),
                "aux_image_size": 64,
                **overrides,
            }
        )

    return make


@pytest.fixture()
def build(model_config):
    """A function: a small model, seeded, with overrides of its config."""

    def make(seed=0, **overrides) -> Blip2OPTKVMod:
        torch.manual_seed(seed)
        return Blip2OPTKVMod.from_config(model_config(**overrides))

    return make


@pytest.fixture()
def stock(files):
    """LAVIS's own Blip2OPT with the same weights, on the CPU."""
    from lavis_kvmod.weights import reading

    torch.manual_seed(0)
    model = SmallBlip2OPT(opt_model=str(files.opt), num_query_token=QUERIES).float()
    model.visual_encoder.load_state_dict(reading.read_weights(files.vit))
    model.load_state_dict(reading.read_weights(files.blip2), strict=False)
    return model


@pytest.fixture(autouse=True)
def _same_log_handlers():
    """A command's `set_up_logging` holds the stream of the test that called it, which is closed afterwards."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in [h for h in root.handlers if type(h) is logging.StreamHandler and h not in before]:
        root.removeHandler(handler)


@pytest.fixture(autouse=True)
def _same_cache_root(monkeypatch):
    """A run file's ``env.cache_root`` stays in force after its run; here it ends with the test."""
    from lavis.common.registry import registry

    monkeypatch.setitem(registry.mapping["paths"], "cache_root", registry.get_path("cache_root"))


def _images(b, seed=0):
    return torch.randn(b, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture()
def images():
    """A function: b random images as BLIP's processor gives them."""
    return _images


@pytest.fixture()
def vqa_batch():
    """Two questions with three and one answers, as LAVIS's VQA collater gives them."""
    return {
        "image": _images(2),
        "text_input": ["which digit is written", "what colour is the ink"],
        "answer": ["seven", "one", "nine", "red"],
        "weight": torch.tensor([0.6, 0.3, 0.1, 1.0]),
        "n_answers": torch.tensor([3, 1]),
        "prompt": "Question: {} Short answer:",
    }


@pytest.fixture()
def served(tmp_path, monkeypatch):
    """A folder, the URL that a server on this machine has it under, the requests that it got (method and path), and the
    headers that it adds to its answers; with an empty download cache."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    requests, headers = [], {}

    class Handler(SimpleHTTPRequestHandler):
        def end_headers(self):
            for key, value in headers.items():
                self.send_header(key, value)
            super().end_headers()

        def log_request(self, *args):
            requests.append((self.command, self.path))

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield SimpleNamespace(folder=folder, url=url, requests=requests, headers=headers)
        server.shutdown()


# ---------------------------------------------------------------- benchmarks, in their layouts

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")  # what scikit-image ships, which LAVIS brings
QUESTIONS = ("What is she?", "What animal is it?", "What is in the cup?", "What is taking off?")
ANSWERS = ("astronaut", "cat", "coffee", "rocket")


def write_photo(path, name):
    """A photograph of scikit-image's, small, as a benchmark's image file."""
    import skimage.data
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(getattr(skimage.data, name)()).resize((72, 60)).save(path)


COCO = {"train2014": range(1, 5), "val2014": range(11, 15), "test2015": range(21, 25)}  # image ids


def official_vqa(subset, first_question):
    """Questions and annotations of four images in visualqa.org's layout, as two dicts."""
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": subset}
    questions, annotations = [], []
    for i, (image_id, question, answer) in enumerate(zip(COCO[subset], QUESTIONS, ANSWERS)):
        key = {"image_id": image_id, "question_id": first_question + i}
        questions.append({**key, "question": question})
        answers = [answer] * 7 + ["photo"] * 2 + ["yes"]
        annotations.append(
            {
                **key,
                "question_type": "what is" if i else "who",
                "answer_type": "other",
                "multiple_choice_answer": answer,
                "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": k} for k, a in enumerate(answers)],
            }
        )
    return {**head, "task_type": "Open-Ended", "questions": questions}, {**head, "annotations": annotations}


@pytest.fixture(scope="session")
def benchmark_root(tmp_path_factory):
    """A LAVIS cache root with four photographs of each benchmark, and its annotations as it or LAVIS publishes them."""
    import json

    root = tmp_path_factory.mktemp("benchmarks")

    def write(path, content):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(content))

    captions = [f"a photo of {'an' if answer[0] == 'a' else 'a'} {answer}" for answer in ANSWERS]
    numbers = range(1, 5)
    for subset, ids in COCO.items():
        for i, photo in zip(ids, PHOTOS):
            write_photo(root / f"coco/images/{subset}/COCO_{subset}_{i:012d}.jpg", photo)
    for i, photo in zip(numbers, PHOTOS):
        write_photo(root / f"gqa/images/n{i}.jpg", photo)
        write_photo(root / f"vg/images/VG_100K/{i}.jpg", photo)
        write_photo(root / f"nocaps/images/val/00{i}ea.jpg", photo)
        write_photo(root / f"textvqa/images/train_images/00{i}f.jpg", photo)

    # VQAv2, from visualqa.org
    for subset, first in (("train2014", 10), ("val2014", 20), ("test2015", 30)):
        questions, annotations = official_vqa(subset, first)
        write(f"coco/annotations/v2_OpenEnded_mscoco_{subset}_questions.json", questions)
        if subset != "test2015":
            write(f"coco/annotations/v2_mscoco_{subset}_annotations.json", annotations)
    write("coco/annotations/v2_OpenEnded_mscoco_test-dev2015_questions.json", questions)

    # LAVIS's own files: lists of rows
    def rows(subset, first, answers=True):
        return [
            {
                "image": f"{subset}/COCO_{subset}_{i:012d}.jpg",
                "question": question,
                "question_id": first + k,
                "dataset": "vqa",
                **({"answer": [answer] * 7 + ["photo"] * 2 + ["yes"]} if answers else {}),
            }
            for k, (i, question, answer) in enumerate(zip(COCO[subset], QUESTIONS, ANSWERS))
        ]

    write("coco/annotations/vqa_train.json", rows("train2014", 10))
    write("coco/annotations/vqa_val.json", rows("val2014", 20))
    write("coco/annotations/vqa_val_eval.json", rows("val2014", 20, answers=False))
    write("coco/annotations/vqa_test.json", rows("test2015", 30, answers=False))
    write("coco/annotations/answer_list.json", [*ANSWERS, "photo", "yes"])
    write("okvqa/annotations/okvqa_train.json", rows("train2014", 10))
    write("okvqa/annotations/vqa_val_eval.json", rows("val2014", 20, answers=False))
    write("okvqa/annotations/answer_list.json", list(ANSWERS))
    questions, annotations = official_vqa("val2014", 20)
    write("okvqa/annotations/OpenEnded_mscoco_val2014_questions.json", questions)
    write("okvqa/annotations/mscoco_val2014_annotations.json", annotations)
    for split, answered in (("train", True), ("val", True), ("test", False)):
        found = [
            {
                "split": split,
                "image": row["image"],
                "image_id": 11 + k,
                "question": row["question"],
                "question_id": f"22Mex{k}",
                "choices": list(ANSWERS),
                **({"correct_choice_idx": k, "direct_answers": row["answer"]} if answered else {}),
            }
            for k, row in enumerate(rows("val2014", 20))
        ]
        write(f"aokvqa/annotations/aokvqa_v1p0_{split}.json", found)
    write("aokvqa/annotations/specialized_vocab_train_lavis.json", list(ANSWERS))
    for split, answered in (("train", True), ("val", True), ("testdev", True), ("test", False)):
        found = [
            {
                "image": f"n{i}.jpg",
                "question": question,
                "question_id": f"05{i}",
                "dataset": "gqa",
                **({"answer": answer} if answered else {}),
            }
            for i, question, answer in zip(numbers, QUESTIONS, ANSWERS)
        ]
        write(f"gqa/annotations/{split}_balanced_questions.json", found)
    vg = [
        {"image": f"VG_100K/{i}.jpg", "question": question, "question_id": i, "answer": answer, "dataset": "vg"}
        for i, question, answer in zip(numbers, QUESTIONS, ANSWERS)
    ]
    write("vg/annotations/vg_qa.json", vg)
    write("vg/annotations/vg_caption.json", [{"image": r["image"], "caption": c} for r, c in zip(vg, captions)])

    # COCO captions in the Karpathy layout, NoCaps, TextVQA
    for split in ("train", "val", "test"):
        subset = "train2014" if split == "train" else "val2014"
        names = [f"{subset}/COCO_{subset}_{i:012d}.jpg" for i in COCO[subset]]
        if split == "train":
            found = [
                {"image": n, "caption": c, "image_id": f"coco_{i}"} for i, (n, c) in enumerate(zip(names, captions))
            ]
        else:
            found = [{"image": n, "caption": [c, f"{c} again"]} for n, c in zip(names, captions)]
        write(f"coco/annotations/coco_karpathy_{split}.json", found)
    nocaps = {
        "images": [{"id": i, "file_name": f"00{i}ea.jpg", "domain": "out-domain"} for i in numbers],
        "annotations": [{"id": i, "image_id": i, "caption": c} for i, c in zip(numbers, captions)]
        + [{"id": 10 + i, "image_id": i, "caption": f"{c} again"} for i, c in zip(numbers, captions)],
    }
    write("nocaps/annotations/nocaps_val_4500_captions.json", nocaps)
    write("nocaps/annotations/nocaps_val.json", [{"image": f"val/00{i}ea.jpg", "img_id": i} for i in numbers])
    textvqa = [
        {
            "image_id": f"00{i}f",
            "question": q,
            "question_id": 34600 + i,
            "answers": [a] * 9 + ["Two"],
            "set_name": "val",
        }
        for i, q, a in zip(numbers, QUESTIONS, ANSWERS)
    ]
    write("textvqa/annotations/TextVQA_0.5.1_val.json", {"dataset_version": "0.5.1", "data": textvqa})
    return root


@pytest.fixture()
def benchmarks(benchmark_root, tmp_path, monkeypatch):
    """`benchmark_root` as LAVIS's cache root, while standing in an empty folder."""
    from lavis.common.registry import registry

    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(benchmark_root))
    monkeypatch.chdir(tmp_path)
    return benchmark_root
