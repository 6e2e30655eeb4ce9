"""image.py NAME:TAG FOLDER OUT.tar COMMAND..: an image of a folder, without any container tool, for `ctr image import`."""

import hashlib
import io
import json
import sys
import tarfile


def main(name, folder, out, command):
    def plain(entry):
        entry.mtime = entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as layer:
        layer.add(folder, arcname=".", filter=plain)
    layer = packed.getvalue()
    digest = hashlib.sha256(layer).hexdigest()
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": command, "Env": ["PATH=/usr/bin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + digest]},
    }
    config = json.dumps(config).encode()
    config_name = hashlib.sha256(config).hexdigest() + ".json"
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": [digest + "/layer.tar"]}]
    with tarfile.open(out, "w") as image:
        for path, data in (
            (config_name, config),
            (digest + "/layer.tar", layer),
            ("manifest.json", json.dumps(manifest).encode()),
        ):
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            image.addfile(entry, io.BytesIO(data))


main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
