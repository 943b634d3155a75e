"""An RTSP server for tests, run by the system's Python, which has GStreamer's bindings.

Plays a file to each client from its start, or (`--live WxH`) a test picture that all clients share. On its
standard input, `resize WxH` changes the size of the live picture.
"""

import argparse
import sys
import threading

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import Gio, GLib, Gst, GstRtsp, GstRtspServer  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("port")
parser.add_argument("--video")
parser.add_argument("--live")
parser.add_argument("--codec", default="h264")
parser.add_argument("--login")
parser.add_argument("--tls", nargs=2)
options = parser.parse_args()

X = "tune=zerolatency speed-preset=ultrafast key-int-max=15"
ENCODERS = {
    "h264": f"x264enc {X} ! h264parse ! rtph264pay config-interval=-1",
    "h265": f"x265enc {X} ! h265parse ! rtph265pay config-interval=-1",
    "jpeg": "videoconvert ! video/x-raw,format=I420 ! jpegenc ! rtpjpegpay",
    "theora": "theoraenc ! rtptheorapay",
}


def caps(size: str) -> str:
    width, height = size.split("x")
    return f"video/x-raw,width={width},height={height},framerate=15/1"


def live(size: str) -> str:
    return (
        "( videotestsrc is-live=true pattern=ball ! videoscale ! capsfilter name=size caps="
        f'"{caps(size)}" ! {ENCODERS[options.codec]} name=pay0 pt=96 )'
    )


def resize_as_told(factory: GstRtspServer.RTSPMediaFactory) -> None:
    media: list[GstRtspServer.RTSPMedia] = []
    factory.connect("media-configure", lambda factory, made: media.append(made))
    for line in sys.stdin:
        size = line.split()[1]
        factory.set_launch(live(size))  # for clients that come after all have left
        for made in media:
            filters = made.get_element().get_by_name("size")
            filters.set_property("caps", Gst.Caps.from_string(caps(size)))
        print("done", flush=True)


Gst.init(None)
server = GstRtspServer.RTSPServer()
server.set_address("127.0.0.1")
server.set_service(options.port)
factory = GstRtspServer.RTSPMediaFactory()
if options.live:
    factory.set_shared(True)
    factory.set_launch(live(options.live))
    threading.Thread(target=resize_as_told, args=(factory,), daemon=True).start()
else:
    payload = "! h264parse ! rtph264pay name=pay0 pt=96 config-interval=-1"
    factory.set_launch(f"( filesrc location={options.video} ! qtdemux {payload} )")
if options.login or options.tls:
    auth = GstRtspServer.RTSPAuth()
    token = GstRtspServer.RTSPToken()
    token.set_string(GstRtspServer.RTSP_TOKEN_MEDIA_FACTORY_ROLE, "viewer")
    if options.login:
        user, _, password = options.login.partition(":")
        auth.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
        auth.add_digest(user, password, token)
    else:
        auth.set_default_token(token)
    if options.tls:
        certificate = Gio.TlsCertificate.new_from_files(*options.tls)
        auth.set_tls_certificate(certificate)
    server.set_auth(auth)
    permissions = GstRtspServer.RTSPPermissions()
    permissions.add_role("viewer")
    permissions.add_permission_for_role("viewer", GstRtspServer.RTSP_PERM_MEDIA_FACTORY_ACCESS, True)
    permissions.add_permission_for_role("viewer", GstRtspServer.RTSP_PERM_MEDIA_FACTORY_CONSTRUCT, True)
    factory.set_permissions(permissions)
server.get_mount_points().add_factory("/stream", factory)
server.attach(None)
print("ready", flush=True)
GLib.MainLoop().run()
