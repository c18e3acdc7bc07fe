"""Fetch a published data set into the layout that `jettclip.sources` reads.

    python -m jettclip.download coco data/coco      # make data SOURCE=coco DATA=data/coco

What may be fetched without asking is, with its checksum and a progress bar; a sentence says what is left to do by hand.
"""
import argparse
import zipfile
from pathlib import Path
from urllib.error import URLError

from huggingface_hub import hf_hub_download
from torchvision.datasets.utils import download_and_extract_archive

COCO_IMAGES = "http://images.cocodataset.org/zips/{}.zip"
# Archives as (address, MD5 or None where none is published); ("hf", repository, file) is checked by huggingface_hub.
FILES = {
    "coco": [("http://images.cocodataset.org/annotations/annotations_trainval2017.zip", "f4bbac642086de4f52a3fdda2de5fa2c"),
             (COCO_IMAGES.format("val2017"), "442b8da7639aecaf257c1dceb8ba8c80"),
             (COCO_IMAGES.format("train2017"), "cced6f7f71b7629ddf16f17bbcfab6b2")],
    "karpathy": [("https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip", None)],
    "sharegpt4v": [("hf", "Lin-Chen/ShareGPT4V", "share-captioner_coco_lcs_sam_1246k_1107.json")],
    "urban1k": [("hf", "BeichenZhang/Urban1k", "Urban1k.zip")],
    "cifar10": [("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")],
    "cifar100": [("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8")],
}
BY_HAND = {
    "karpathy": "Put the images beside the JSON file: COCO's train2014/ and val2014/ (cocodataset.org), or Flickr30k's in one folder "
                "(its authors send a link on request). Keep one of the three JSON files.",
    "sharegpt4v": "Put the images below data/: coco/train2017 (make data SOURCE=coco), llava/llava_pretrain/images (LLaVA-Pretrain on "
                  "huggingface.co), sam/images (ai.meta.com/datasets/segment-anything, after its licence). Rows without image are left out.",
    "urban1k": "data_root is the folder in it that holds image/ and caption/.",
    "flickr8k": "Flickr8k's authors send a link on request. Write it as flickr8k_<size>px_<split>.parquet with the columns image (JPEG "
                "bytes), filename, captions (list of 5), split.",
    "imagenet": "ImageNet needs an account at image-net.org. Put the validation images into val/<wnid>/, one folder for each class.",
}


def fetch(source, folder):
    """Download what can be had of `source` into `folder` and unpack it; finished files are not fetched again."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for address, *rest in FILES.get(source, []):
        name = rest[1] if address == "hf" else address.rsplit("/", 1)[1]
        print(f"{source}: {name}")
        try:
            if address == "hf":
                path = hf_hub_download(*rest, repo_type="dataset", local_dir=folder)
                if name.endswith(".zip"):
                    with zipfile.ZipFile(path) as archive:
                        archive.extractall(folder)
            else:
                download_and_extract_archive(address, folder, md5=rest[0])
        except (URLError, OSError, RuntimeError) as error:
            raise SystemExit(f"{name} could not be fetched ({type(error).__name__}: {error}). Where there is no network, fetch "
                             f"{address if address != 'hf' else f'huggingface.co/datasets/{rest[0]}'} elsewhere and unpack it in {folder}.") from None
    print(BY_HAND.get(source, f"{source} is ready: data_root: {folder}"))


def main():
    parser = argparse.ArgumentParser(prog="python -m jettclip.download", description=__doc__.splitlines()[0])
    parser.add_argument("source", choices=sorted({*FILES, *BY_HAND}))
    parser.add_argument("folder")
    args = parser.parse_args()
    fetch(args.source, args.folder)


if __name__ == "__main__":
    main()
