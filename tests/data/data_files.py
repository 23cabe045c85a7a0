"""Small files in the public formats, and a server on this machine that stands in for the web."""

import gzip
import hashlib
import struct
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import scipy.io


def idx_bytes(array):
    """Bytes of an IDX file of an array of bytes."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(folder, images, labels, part="train", pack=True):
    """Write one part of MNIST in its public names, gzip or plain."""
    stem = {"train": "train", "test": "t10k"}[part]
    (folder / "mnist").mkdir(parents=True, exist_ok=True)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        data = idx_bytes(array)
        path = folder / "mnist" / f"{stem}-{name}-ubyte"
        if pack:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(data, 1))
        else:
            path.write_bytes(data)


def write_mat(path, **variables):
    """Write a MATLAB file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, variables)


def sha256(data):
    """The checksum as a source has it."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


@contextmanager
def serving(files, *, promise=None):
    """Serve a mapping of paths to bytes; ``promise`` overstates the length of each by that much."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            data = files.get(self.path)
            if data is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data) + (promise or 0)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
