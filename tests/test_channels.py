"""Images that are no RGB photos: what TIFF, npy and PNG hold, to the last bit; what is made of it; options."""

import base64
import io
import itertools
import struct
import tarfile
import zlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_train import MICRO

import data
import evaluate
import recipes
import train
from data import draw_crops
from engine.channels import Channels, decode, reader, turned
from engine.images import ImageConfig, read_image, tiff_tags
from engine.sources import Folder, open_source
from engine.task import IMAGES
from model import SIZES

C4 = replace(SIZES["tiny"], in_chans=4, mean=(0.1, 0.2, 0.3, 0.4), std=(0.2,) * 4)

# --------------------------------------------------------------------------------
# Files


def pixels(kind, C=4, H=7, W=10):
    """C H W, no two of a row or column alike"""
    c, i, j = np.ogrid[:C, :H, :W]
    x = 1000 * c + 37 * i + 5 * j
    return (x / 8 if "float" in kind else x).astype(kind)


def lzw(rows):
    """H bytes, uint8 -> one strip, by Pillow"""
    file = io.BytesIO()
    Image.fromarray(rows).save(file, "tiff", compression="tiff_lzw")
    tags = tiff_tags((file.seek(0), file)[1])
    (at,), (size,) = tags[273], tags[279]
    return file.getvalue()[at : at + size]


PACK = {1: np.ndarray.tobytes, 5: lzw, 8: lambda rows: zlib.compress(rows.tobytes())}


def write_tiff(path, x, planar=False, compression=1, big=False, more=(), rows=0):
    """C H W -> a TIFF, if planar of a strip a channel.    more  tags, {number: (type, value)}    rows  of a strip"""
    (C, H, W), e = x.shape, ">" if big else "<"
    x = x.astype(x.dtype.newbyteorder(e))
    parts = list(x) if planar else [x.transpose(1, 2, 0)[y : y + (rows or H)] for y in range(0, H, rows or H)]
    strips = [PACK[compression](np.ascontiguousarray(part).view(np.uint8).reshape(len(part), -1)) for part in parts]
    kind = {"u": 1, "i": 2, "f": 3}[x.dtype.kind]
    tags = {256: (4, [W]), 257: (4, [H]), 258: (3, [8 * x.itemsize] * C), 259: (3, [compression]), 262: (3, [1]),
            273: (4, None), 277: (3, [C]), 278: (4, [rows or H]), 279: (4, list(map(len, strips))),
            284: (3, [1 + planar]), 339: (3, [kind] * C)} | dict(more)
    room = 8 + 2 + 12 * len(tags) + 4
    blob, rest, at = b"", b"", room + sum(len(v or strips) * (2 if t == 3 else 4) for t, v in tags.values())
    tags[273] = 4, [at + sum(map(len, strips[:k])) for k in range(len(strips))]
    for tag, (t, values) in sorted(tags.items()):
        body = struct.pack(e + ("H" if t == 3 else "I") * len(values), *values)
        blob += struct.pack(e + "HHI", tag, t, len(values))
        blob += body.ljust(4, b"\0") if len(body) <= 4 else struct.pack(e + "I", room + len(rest))
        rest += body if len(body) > 4 else b""
    head = struct.pack(e + "2sHI", b"MM" if big else b"II", 42, 8) + struct.pack(e + "H", len(tags))
    path.write_bytes((head + blob + bytes(4) + rest).ljust(at, b"\0") + b"".join(strips))
    return path


GDAL = {  # what GDAL 3.10 wrote of PIXELS, packed: type; file
    "planar LZW, predictor 2, big-endian": ("uint16", ""
        "c-r&zWzb?^VBlcjWn^Gr2C^6#xPSyBl+6w#n80inAYR4D3>9Yu5^PX5P$Q!tSe^%nPce!@#epJ>Vo)}aWE2OpL25QJ%0R`LfP^g)I|$4"
        "M;a`lwFnfU(fPerLN&q1rgA@>=k_?O-K&$}77C`I<#0fxL1;iadya<T*0P!gxegee*Aclh74}=X23Jw7*LcFXkjt`n5e9T07Rh<_Ftl("
        "&1;C;ZL0}(&z5uzr`6>~T#-~~`z`T$IPf<ObqT?QDh!68RWn7_G^E#SoxJEjIkF1Y>%=O<tp5d(;f1hNT?w-6?juK}rRVuqN&#EvkbSp"
        "_U32r+?46xjr(>j)FJy#c9fW`LN$%z`lCPzqRv4`Kqd5RwT1bUR%q"),
    "tiles of zstd, predictor 3": ("float32", ""
        "c-r&y)MDUZU|`^5U|?isU<9(bfS3`=W(Q&>Ae#k9Zv$dxsCd9(1_m}L8-zunY>+w`Byn3Pn;D3mplkskc1B{mFtUKzXMorh%60}4K|nP"
        "iefxko80v;23=p6Ig%H3Dg&JG+|1u<8<z(2zXJ{OdZzR(YJ%Qo43e!#D|Cc#Ll0O{zB_r3itnO*%I>WGscBN^Box+>$Zk4~cZ%%*O)u@"
        "?F{VPt+Qumm#;Y(cI8QlXOZjPPqb8BW!h)#TT<UzWUMDOC_$j^cL0Sj{SB2Tb3X4tJNjx?@V*HL%6?%L@*RtFuG4r9gVPj)X<a(z61LB"
        "q2TDQ7kMFMFK2@80?(?AOw`mt_yaYPEhzIQ_UcL#=X(-YIia_A8%0Y~S|w+k@*{uHNB3WWH_bzIBH;7lnpy&R2LMW3=F-&cPd=N!t>Q7"
        "c`kHlnZd2Kebr?i^qR?k*~=n%gqi<_IS*nr_#k%Ba`vpdsekhk{7d$vD?vOcI@fw6F4k(&M6n0z4Ukgvx4&i>`b2+vl)G4o|euQS|M_F"
        "_dM?cg|BQ1%9;sUbMG=1F1@5JdF?LSIRK?1qR0"),
    "planar tiles of deflate, predictor 3": ("float32", ""
        "c-r&y)MDUZU|`^5U|?isU<9(bfS3`=W(Q&>Ae#k9Zv$dxs5nRm8<Y*gqEI$SoeY%C1jM#bHZu@ALD>R8?2N>AVPpa8I|jtAP`ma4aS)I"
        "V(svDrgQ4Pg7$86a3ac1e7)lvR7@h#d;(!J|0^)Ecs3HbtD6E*1ydgayAteC_EEv=zMWmQ`OiWT-Txujb82J(=O>AsTw4Y(>>H-8U{oU"
        "QK`2v5*KGf-`6V#KK;WF)?g`S>XSr`yp6WR2|Ke3gudefKpEw865x!Nl;AGR}iEazg(ZG1UDC6yNlcorv!1V}S56zU2yR?K;OVIeP*qd"
        "@D!|B3<<JWM;6<}48O+8MM=aFX`ZCdUK=4uO^wJ!6R@98dm6ZuGCYnZnP&WWoGl(iS11{5|)o^V8DQ>q^huezVlV|NgXI)%|?ulI!ehw"
        "SW2++^zM0**@t$+x4^GC)8>Ej4fEVFZx&9r{52D{gB%)f8x@m{l6K^{#pawP@LA#xHn-_SL4J+!5%5aL)-}pjf~O-ZkOYapEz)W!L8Kb"
        "Ehl5bhX#$my#{Z2Oa=Zj8W=Qc{5=cggeLrB-%-cD=*#wlTa2eQ|Kuz9E8lVHK4W>k<_vqrb@hyazji-(r_c6Tp5*}JVGRk^D{KtB-*n-"
        "Y7MU|EGqYGW{^Vse*Z{F~zxcAb2N}=oXShD!Vah*dpe1Dq`<P<(GX(zP2U-%<{FAldFMG$OdKREMp+|B%{xL23BHx~wZovMT^}#Pupp4"
        "M6xffZ^_&2=Xf53ptjd3d@!xd!>MgUX!-9r"),
    "BigTIFF, deflate, predictor 2, 32 bits": ("int32", ""
        "c-r&y)MnsdU|<knfB;@7&A`aazzAh>!Gw^+*r7BNP>co2R)9igBy}86nhi+|Mhh|uz}YHLhA5Icn7LwD>=j4Sn+>I9u-IXXB*p}#gMeb"
        "p45%O&$sbHm2m=*!&Ys)I%g89ga6x?E9sdmtabLtPbl+pDx)|-CU&Xy5(jk{Ii#w+NuWrHqioebOXZRm3KINk8eWrQa!{`s&k6J~jEWY"
        "_+{yybz2h}1)|HKyZ@ts`v;C*X#fu|p9z5SkM_af~duNhw13mpLf(||ZC"),
}


def decoded(path, max_pixels=0):
    with open(path, "rb") as stream:
        return decode(stream, max_pixels)


def same(found, x):
    """Values, type and native order:  found  H W C    x  C H W"""
    return found.dtype == x.dtype and np.array_equal(found.transpose(2, 0, 1), x)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "uint32", "float32", "float64"])
@pytest.mark.parametrize("planar, compression, big", list(itertools.product([False, True], PACK, [False, True])))
def test_tiff_is_what_was_written(tmp_path, kind, planar, compression, big):
    for C in 1, 2, 4, 13:
        x = pixels(kind, C)
        assert same(decoded(write_tiff(tmp_path / "x.tif", x, planar, compression, big)), x)


def test_a_strip_may_be_a_single_row(tmp_path):
    """Of a wide image it is long and flat, as a photo must not be."""
    x = pixels("uint16", 4, 20, 300)
    assert same(decoded(write_tiff(tmp_path / "x.tif", x, rows=1)), x)
    assert same(decoded(write_tiff(tmp_path / "x.tif", x, rows=3, compression=8)), x)


@pytest.mark.parametrize("name", GDAL)
def test_tiff_is_what_gdal_wrote(name):
    """Strips and tiles that end within the image, predictors, both orders of bytes, BigTIFF."""
    kind, *text = GDAL[name]
    x = decode(io.BytesIO(zlib.decompress(base64.b85decode("".join(text)))), 0)
    assert same(x, pixels(kind))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_stand_upright(tmp_path, orientation):
    x, exif = pixels("uint8", 3), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(x.transpose(1, 2, 0).copy()).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(decoded(tmp_path / "x.png"), upright)
    write_tiff(tmp_path / "x.tif", x, more={274: (3, [orientation])})
    assert np.array_equal(decoded(tmp_path / "x.tif"), upright)
    assert np.array_equal(turned(x.transpose(1, 2, 0), orientation), upright)


@pytest.mark.parametrize("shape, axes", [((7, 10), (7, 10, 1)), ((7, 10, 4), None), ((4, 7, 10), (1, 2, 0)),
                                         ((5, 5, 5), None), ((1, 7, 10), (1, 2, 0)), ((13, 40, 13), None)])
def test_channels_of_a_npy_are_its_shorter_outer_axis(tmp_path, shape, axes):
    x = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    for order in "CF":
        np.save(tmp_path / "x.npy", np.array(x, order=order))
        exact = x if axes is None else x.reshape(axes) if len(shape) == 2 else x.transpose(axes)
        assert np.array_equal(decoded(tmp_path / "x.npy"), exact) and decoded(tmp_path / "x.npy").dtype == x.dtype


@pytest.mark.parametrize("mode, colour", [("L", 0), ("RGB", 2), ("RGBA", 6), ("LA", 4)])
def test_png_keeps_16_bits_or_says_so(tmp_path, mode, colour):
    """Pillow has those of greys; of colours the upper 8."""
    x = pixels("uint16", len(mode))
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in x.transpose(1, 2, 0))
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in (
            (b"IHDR", struct.pack(">IIBBBBB", 10, 7, 16, colour, 0, 0, 0)), (b"IDAT", zlib.compress(raw)),
            (b"IEND", b""))))
    if mode == "L":
        assert same(decoded(tmp_path / "x.png"), x)
        return
    with pytest.raises(ValueError, match="a PNG of 16 bits a colour, of which Pillow has 8; write it as TIFF or .npy"):
        decoded(tmp_path / "x.png")


def test_photos_have_the_channels_that_they_show(tmp_path):
    """Opacity is one, of which read_image would make white."""
    palette = Image.new("P", (10, 7), 1)
    palette.putpalette([0, 255, 0, 255, 0, 0])
    for name, image, options, exact in (
            ("a.png", Image.new("RGBA", (10, 7), (1, 2, 3, 4)), {}, (1, 2, 3, 4)),
            ("b.png", Image.new("LA", (10, 7), (1, 2)), {}, (1, 2)),
            ("c.png", palette, {}, (255, 0, 0)),
            ("d.png", palette, dict(transparency=1), (255, 0, 0, 0)),
            ("e.jpg", Image.new("CMYK", (10, 7), (0, 255, 255, 0)), {}, (254, 0, 0)),
            ("f.png", Image.new("1", (10, 7), 1), {}, (255, 255, 255)),
            ("g.tif", Image.fromarray(np.full((7, 10), 0.5, np.float32)), {}, (0.5,)),
            ("h.tif", Image.new("RGB", (10, 7), (1, 2, 3)), dict(compression="jpeg", quality=100), (1, 2, 3))):
        image.save(tmp_path / name, **options)
        assert decoded(tmp_path / name)[3, 4].tolist() == pytest.approx(exact, abs=1), name


@pytest.mark.parametrize("content, says", [
    (np.array([["a"]]), "wanted H W, H W C or C H W, of integers or floats"),
    (np.array([[1j]]), "of complex128"), (np.zeros((0, 3)), r"an array \(0, 3\)"), (np.zeros((1, 2, 3, 4)), "an array"),
    (np.array([[object()]]), "of object"), (np.zeros((2, 2), [("a", "f4")]), "wanted H W"),
    (b"\x93NUMPY\x01\0", "EOF|short|read"), (b"\x93NUMPY\x09\0\0\0", r"a .npy of format \(9, 0\)"),
    (b"II*\0\x08\0\0\0", "truncated|cannot|unpack|read"), (b"II*\0\xff\xff\xff\xff", "."), (b"", "cannot identify"),
])
def test_what_is_no_image_is_named(tmp_path, content, says):
    path = tmp_path / "x.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content, allow_pickle=True)
    with pytest.raises(OSError, match=rf"^{path}: .*({says})") as error:
        reader(ImageConfig(scale=1.0), C4)(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [20, 200, 400])
def test_what_was_cut_short_is_unreadable(tmp_path, cut):
    for name, planar, compression in (("x.tif", False, 1), ("x.tif", True, 5), ("x.tif", False, 8), ("x.npy", 0, 0)):
        path = tmp_path / name
        np.save(path, pixels("uint16")) if name == "x.npy" else write_tiff(path, pixels("uint16"), planar, compression)
        path.write_bytes(path.read_bytes()[: min(cut, path.stat().st_size - 10)])
        with pytest.raises(OSError, match=f"^{path}: "):
            reader(ImageConfig(), C4)(path)


def test_a_file_that_says_it_is_large_is_refused_by_its_header(tmp_path, monkeypatch):
    """By values: 13 channels weigh more than three."""
    write_tiff(tmp_path / "x.tif", pixels("uint16", 6))
    np.save(tmp_path / "x.npy", pixels("uint16", 6))
    for name in "x.tif", "x.npy":
        assert decoded(tmp_path / name, 140).shape == (7, 10, 6)
        with pytest.raises(ValueError, match="10x7 pixels of 6 channels are more than --max_pixels 139"):
            decoded(tmp_path / name, 139)
    for tag in 278, 279:  # strips that are not as many, or as long, as they say
        path = write_tiff(tmp_path / "y.tif", pixels("uint16", 6), more={tag: (4, [5] if tag == 278 else [10**6])})
        with pytest.raises(ValueError, match="1 strips or tiles of .* bytes, where . belong, or more bytes than"):
            decoded(path)
    with pytest.raises(ValueError, match="strips or tiles of 10 bytes, where 840 belong"):
        decoded(write_tiff(tmp_path / "y.tif", pixels("uint16", 6), more={279: (4, [10])}))
    with pytest.raises(OSError, match="cannot identify"):
        decoded(write_tiff(tmp_path / "y.tif", pixels("uint16", 6), more={266: (3, [2])}))  # bits in reverse order
    for h in 0, 2**31:
        with pytest.raises(ValueError, match=f"strips or tiles of 16x{h} pixels; wanted some, and no more than"):
            decoded(write_tiff(tmp_path / "y.tif", pixels("uint16", 6), more={
                322: (4, [16]), 323: (4, [h]), 324: (4, [8]), 325: (4, [8])}), 10**6)
    tags = {256: (4, [2**31]), 257: (4, [2**31])}
    write_tiff(tmp_path / "x.tif", pixels("uint8", 1), more=tags)
    with pytest.raises(OSError, match="2147483648x2147483648 pixels of 1 channels are more"):
        reader(ImageConfig(), replace(C4, in_chans=1, mean=(0.5,)))(tmp_path / "x.tif")
    write_tiff(tmp_path / "x.tif", np.zeros((4, 1, 101), np.uint8))
    with pytest.raises(OSError, match="101x1 pixels: the long side is more than 100 times"):
        reader(ImageConfig(), C4)(tmp_path / "x.tif")

# --------------------------------------------------------------------------------
# What is made of them


def test_infrared_is_no_opacity(tmp_path):
    """Without a word on what the fourth channel is, or with one that it is none of opacity."""
    x = pixels("uint8")
    for C, more in (4, {262: (3, [2])}), (4, {262: (3, [2]), 338: (3, [0])}), (13, {}), (2, {}):
        write_tiff(tmp_path / "x.tif", pixels("uint8", C), more=more)
        with pytest.raises(OSError, match=rf"x\.tif: image has {C} channels, model 3: --in_chans {C} or --bands"):
            read_image(tmp_path / "x.tif")
    write_tiff(tmp_path / "x.tif", x, more={262: (3, [2]), 338: (3, [2])})  # opacity it is
    Image.fromarray(x.transpose(1, 2, 0).copy(), "RGBA").save(tmp_path / "x.png")
    assert torch.equal(read_image(tmp_path / "x.tif"), read_image(tmp_path / "x.png"))
    ours = reader(ImageConfig(), C4)(tmp_path / "x.tif")
    torch.testing.assert_close(ours, torch.from_numpy(x / np.float32(255)), rtol=0, atol=0)


def test_bands_are_picked_in_order_and_scaled(tmp_path):
    x = pixels("uint16")
    path = write_tiff(tmp_path / "x.tif", x)
    for words, exact in (
            (dict(), x / 65535), (dict(scale=4000.0), x / 4000), (dict(scale=1000.0), (x / 1000).clip(0, 1)),
            (dict(bands="4,1,1,2", scale=4000.0), x[[3, 0, 0, 1]] / 4000)):
        ours = reader(ImageConfig(**words), C4)(path)
        assert ours.dtype == torch.float32 and ours.is_contiguous()
        assert np.abs(ours.numpy() - exact).max() < 1e-7                             # measured: 3e-8
    ours = reader(ImageConfig(bands="3,2,1"), SIZES["tiny"])(path)                   # of a network for RGB
    assert np.abs(ours.numpy() - x[[2, 1, 0]] / 65535).max() < 1e-7
    with open(path, "rb") as stream:
        assert torch.equal(reader(ImageConfig(bands="3,2,1"), SIZES["tiny"])(stream, "a.tar/x.tif"), ours)


def test_percentiles_are_of_each_channel_and_of_what_was_measured():
    x = np.random.default_rng(0).normal(size=(20, 30, 2)) * [3, 50] + [0, 1000]
    x[:5] = -9999
    image = Channels((), 0, (10, 90), -9999, 0, (0.25, 0.75)).image(x.astype(np.float32)).numpy()
    for c in range(2):
        low, high = np.sort(x[5:, :, c].ravel())[[round(449 * 0.1), round(449 * 0.9)]]
        exact = ((x[5:, :, c] - low) / (high - low)).clip(0, 1)
        assert np.abs(image[c, 5:] - exact).max() < 0.01                             # between two ranks: measured 0.004
        assert (image[c, :5] == (0.25, 0.75)[c]).all()
    assert Channels((), 0, (10, 90), None, 0, (0.5,)).image(np.full((3, 3, 1), 7, np.uint8)).unique().tolist() == [0]


@pytest.mark.parametrize("kind, nodata, value", [("uint16", "0", 0), ("float32", "nan", np.nan), ("int16", "-99", -99),
                                                 ("float32", "-3.4028234663852886e+38", np.finfo("f4").min)])
def test_nodata_is_zero_once_it_is_normalised(tmp_path, kind, nodata, value):
    x = pixels(kind) + 1
    x[:, 2:4, 3] = value
    x[1, 5, 5] = value
    path = write_tiff(tmp_path / "x.tif", x.astype(kind))
    image = reader(ImageConfig(nodata=nodata, scale=5000.0), C4)(path)
    views = data.augment(image[None], torch.zeros(1, 12), C4.mean, C4.std)[0]
    assert views[:, 2:4, 3].abs().max() < 1e-6 and views[1, 5, 5].abs() < 1e-6 and views.isfinite().all()
    assert (views == 0).sum() + (views.abs() < 1e-6).sum() < 30 and torch.equal(
        reader(ImageConfig(scale=5000.0), C4)(write_tiff(path, pixels(kind) + np.array(1, kind)))[0, 5], image[0, 5])


def test_what_was_not_measured_is_unreadable_if_nothing_says_so(tmp_path):
    x = pixels("float32")
    x[0, 0, :3] = np.nan, np.inf, -np.inf
    path = write_tiff(tmp_path / "x.tif", x)
    with pytest.raises(OSError, match=r"x\.tif: 3 of 280 values are nan or infinite"):
        reader(ImageConfig(scale=9.0), C4)(path)
    with pytest.raises(OSError, match=r"x\.tif: 2 of 279 values are nan or infinite"):
        reader(ImageConfig(scale=9.0, nodata="nan"), C4)(path)
    assert reader(ImageConfig(scale=9.0, bands="2,3,4,2"), C4)(path).isfinite().all()


@pytest.mark.parametrize("C, kind, words, says", [
    (13, "uint16", {}, "image has 13 channels, model 4: --in_chans 13 or --bands"),
    (1, "uint8", {}, "image has 1 channel, model 4: --in_chans 1 or --bands"),
    (1, "uint8", dict(bands="1,2,3,4"), "image has 1 channel, --bands asks for number 4"),
    (4, "float32", {}, "values are float32: say which of them becomes 1, --scale, or --percentiles 2,98"),
    (4, "int16", {}, "values are int16: say which of them becomes 1"),
])
def test_images_that_do_not_fit_are_named(tmp_path, C, kind, words, says):
    path = write_tiff(tmp_path / "x.tif", pixels(kind, C))
    with pytest.raises(OSError, match=rf"^{path}: {says}"):
        reader(ImageConfig(**words), C4)(path)


def test_rgb_is_as_it_was(tmp_path):
    Image.new("RGB", (5, 3), (1, 2, 3)).save(tmp_path / "x.png")
    read = reader(ImageConfig(max_pixels=14), SIZES["tiny"])
    assert isinstance(read, partial) and read.func is read_image
    with pytest.raises(OSError, match="5x3 pixels are more than --max_pixels 14"):
        read(tmp_path / "x.png")


def test_folders_are_searched_for_arrays_only_where_they_are_images(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    np.save(tmp_path / "photos/a.npy", pixels("uint16"))
    Image.new("RGBA", (5, 3)).save(tmp_path / "photos/b.png")
    for _ in range(2):  # from the disk, and remembered
        assert list(open_source(tmp_path / "photos").paths) == ["b.png"]
        assert list(Folder(tmp_path / "photos", reader(ImageConfig(), C4)).paths) == ["a.npy", "b.png"]


def test_a_tar_of_them_is_read_as_a_folder_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    for k in range(3):
        write_tiff(tmp_path / f"photos/{k}.tif", pixels("uint16") + np.uint16(k), k == 1, 5)
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(tmp_path / "photos", ".")
    read = reader(ImageConfig(scale=4000.0), C4)
    folder, shards = (open_source(tmp_path / name, read=read) for name in ("photos", "photos.tar"))
    assert len(folder) == len(shards) == 3
    assert all(torch.equal(folder.load(k), shards.load(k)) for k in range(3))

# --------------------------------------------------------------------------------
# Crops and colours


def test_16_bits_stay_so_through_the_crops():
    """Of 65,536 levels, not 256: a gradient of 100 of them has 100 values in the crop, and as many as there are"""
    x = torch.arange(100, dtype=torch.float32).expand(5, 100, 100).contiguous() / 65535
    assert data.cut(x, (10, 0, 80, 100), True, 100)[3, 50].unique().numel() == 100
    assert torch.equal(data.cut(x, (0, 0, 100, 100), False, 100), x)
    exact = torch.nn.functional.interpolate(x[None, :, 10:90], (40, 40), mode="bicubic", antialias=True)[0].clamp(0, 1)
    assert torch.equal(data.cut(x, (10, 0, 80, 100), False, 40), exact)
    edge = (torch.arange(64)[None] > 31).float().expand(2, 64, 64)
    assert data.cut(edge, (0, 0, 64, 64), False, 80).aminmax() == (0, 1)             # it would overshoot


def by_hand(x, row, mean, std):
    """A float crop, pixel by pixel, in double: C H W"""
    x, row = x.double().numpy().copy(), row.tolist()
    for turn in row[5:9] if row[0] else ():
        low = {0: 0 * x, 1: 0 * x + x.mean(), 2: x.mean(0, keepdims=True) + 0 * x}.get(int(turn), x)
        x = np.clip(low + (x - low) * row[1 + int(turn)], 0, 1) if turn < 3 else x
    x = x.mean(0, keepdims=True) + 0 * x if row[9] else x
    if row[10]:
        taps = np.exp(-0.5 * (np.arange(-4, 5) / row[10]) ** 2)
        for axis in 1, 2:
            pad = np.pad(x, [(4, 4) if a == axis else (0, 0) for a in range(3)], mode="reflect")
            x = sum(t * np.take(pad, np.arange(x.shape[axis]) + k, axis) for k, t in enumerate(taps / taps.sum()))
    x = np.where(x >= 0.5, 1 - x, x) if row[11] else x
    return (x - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))


@pytest.mark.parametrize("C", [1, 2, 3, 4, 13])
def test_colours_of_n_channels(C):
    """No hue; grey and saturation about the channels' mean; brightness, contrast, blur and solarize as of RGB."""
    c = recipes.TrainConfig(n_local=58, jitter=0.7, grey=0.3, blur_local=0.3)
    colours = torch.from_numpy(draw_crops(np.random.default_rng(5), c, 40, 50)[2])
    colours[::3, 11] = 1
    x = torch.rand(60, C, 12, 9, generator=torch.Generator().manual_seed(0))
    before, mean, std = x.clone(), np.linspace(0.2, 0.6, C), np.linspace(0.5, 0.3, C)
    ours = data.augment(x, colours, mean.tolist(), std.tolist())
    exact = np.stack([by_hand(*each, mean, std) for each in zip(x, colours, strict=True)])
    assert np.abs(ours.numpy() - exact).max() < 2e-6                                 # measured: 5e-7
    assert torch.equal(x, before) and ours.dtype == torch.float32

def test_batches_have_the_channels_of_their_images(tmp_path):
    """Those of no local crops, too."""
    write_tiff(tmp_path / "x.tif", pixels("uint16", 5))
    for n_local in 0, 1:
        c = recipes.TrainConfig(in_chans=5, mean=(0.5,) * 5, std=(0.5,) * 5, batch=2, group=2, patch_size=8,
                                global_size=16, local_size=8, n_local=n_local)
        batch = data.Batches(c, Folder(tmp_path, reader(c, c)), 0, 2)[0]
        assert batch["global_crops"].shape == (4, 5, 16, 16) and batch["local_crops"].shape == (2 * n_local, 5, 8, 8)

# --------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize("words, says", [
    ("--bands 4,3", "--bands 4,3 names 2 channels, the network has 3: --in_chans 2, or other --bands"),
    ("--in_chans 4 --bands 1,2,3", "names 3 channels, the network has 4: --in_chans 3"),
    ("--bands 0,1,2", "--bands 0,1,2: write numbers of channels, from 1, as in 4,3,2"),
    ("--bands a,b,c", "--bands a,b,c: write numbers"), ("--bands 1,,2", "--bands 1,,2: write numbers"),
    ("--scale 3000", "--scale, --percentiles and --nodata are for images that are no RGB photos; .*--bands 1,2,3"),
    ("--nodata 0", "are for images that are no RGB photos"),
    ("--in_chans 4 --scale -1", r"--scale is -1; it must be in \[0, 1e30\]"),
    ("--in_chans 4 --scale nan", "--scale wants float"),
    ("--in_chans 4 --scale 10 --percentiles 2,98", "--scale and --percentiles both say what becomes 1"),
    ("--in_chans 4 --percentiles 98,2", r"--percentiles is 98,2; it must be in \[0, 100\] rising"),
    ("--in_chans 4 --nodata none", "--nodata 'none': write a number, or nan"),
    ("--in_chans 4 --mean 0.5,0.5,0.5", "--mean wants 4 numbers, as in .*, got '0.5,0.5,0.5'"),
    ("--in_chans 4 --std 0.5", "--std wants 4 numbers"), ("--mean 0.1,0.2,0.3,0.4", "--mean wants 3 numbers"),
    ("--in_chans 0", r"--in_chans is 0; it must be in \[1, 1024\]"), ("--in_chans two", "--in_chans wants int"),
    ("--max_pixels -1", "--max_pixels is -1"),
])
def test_mistakes_are_one_line(words, says, tmp_path):
    with pytest.raises(ValueError, match=says) as error:
        recipes.configure(["--data", str(tmp_path), *words.split(), "--out", str(tmp_path / "run")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", ["--in_chans 4", "--bands 3,2,1"])
def test_the_generated_set_is_rgb(words, tmp_path):
    write_tiff(tmp_path / "x.tif", pixels("uint16"))
    for source in "shapes", f"{tmp_path}*0.5,shapes*0.5":
        with pytest.raises(ValueError, match="--data shapes are RGB pictures; --in_chans 3, without --bands"):
            train.main([*MICRO, "--data", source, *words.split(), "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "config.json").exists()


def test_one_number_will_do_for_one_channel(tmp_path):
    c = recipes.configure(["--in_chans", "1", "--mean", "0.5", "--data", str(tmp_path), "--out", str(tmp_path / "run")])
    assert c.mean == (0.5,) and len(c.std) == 1 == c.vit.in_chans


def test_tasks_have_the_options_that_they_read():
    c = evaluate.configure("--task knn --weights untrained:tiny --data x --max_pixels 7 --bands 3,2,1".split())
    assert (c.max_pixels, c.bands) == (7, "3,2,1") and {option.name for option in IMAGES} <= vars(c).keys()
    for words, says in (("knn --percentiles 98,2", "rising"), ("knn --scale x", "--scale wants float"),
                        ("ade20k --bands 1,2,3", "ade20k does not read it")):
        with pytest.raises(ValueError, match=says):
            evaluate.configure(f"--weights untrained:tiny --data x --task {words}".split())
