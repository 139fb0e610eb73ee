#!/usr/bin/env python3
"""Makes the corpus of messages that must arrive as they were submitted. Needs openssl 3 and gpg 2; run it in this
folder. What is signed or encrypted differs with each run, for its keys are thrown away."""
import base64, os, re, subprocess, tempfile

os.chdir(os.path.dirname(os.path.abspath(__file__)))
HEAD = (b"From: Dev <dev@corpus.example>\r\nTo: ann@contoso.example\r\nDate: Tue, 24 Nov 2026 10:00:00 +0000\r\n"
        b"Message-ID: <%s@corpus.example>\r\n")


def crlf(b):
    return re.sub(rb"\r?\n", b"\r\n", b)


def put(name, rest, head=None):
    with open(name + ".eml", "wb") as f:
        f.write((HEAD % name.encode() if head is None else head) + rest)


def run(*args, stdin=b""):
    return subprocess.run(args, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout


MIME = b"MIME-Version: 1.0\r\n"
put("plain", b"Subject: plain\r\n\r\nhello\r\n")
put("no-body", b"Subject: no body\r\n\r\n")
put("dots", b"Subject: dots\r\n\r\n.\r\n..\r\n.x\r\n...\r\n\r\n.\r\n")
put("trailing-space", b"Subject: trailing space  \r\n\r\na  \r\n\t\r\nb\t\r\n\r\n\r\n")
put("latin1-8bit", b"Subject: 8 bit\r\n" + MIME + b"Content-Type: text/plain; charset=iso-8859-1\r\nContent-Transfer-Encoding: 8bit\r\n\r\nGr\xfc\xdfe\r\n")
put("utf8-8bit", b"Subject: 8 bit\r\n" + MIME + b"Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n" + "Grüße 😀 שלום\r\n".encode())
put("encoded-words", b"Subject: =?utf-8?B?" + base64.b64encode("Grüße 😀".encode()) + b"?= =?utf-8?Q?_=E2=80=AEdcba=E2=80=AC?=\r\n =?iso-2022-jp?B?GyRCRnxLXBsoQg==?=\r\n" + MIME + b"\r\nx\r\n")
put("odd-spacing", b"Subject:no space\r\nX-Empty:\r\nX-Folded: a\r\n\tb\r\n   c\r\nx-lower: 1\r\nX-Twice: 1\r\nX-Twice: 2\r\nX-Colon: a: b: c\r\n\r\nx\r\n")
put("long-header", b"Subject: long\r\nReferences: " + b"\r\n ".join(b"<%d@corpus.example>" % i for i in range(400)) + b"\r\nX-Long: " + b"y" * 900 + b"\r\n\r\nx\r\n")
put("long-lines", b"Subject: long lines\r\n" + MIME + b"Content-Type: text/plain\r\n\r\n" + b"z" * 998 + b"\r\n" + b"w" * 990 + b"\r\n")
put("html-inline", b"Subject: html\r\n" + MIME + b"Content-Type: multipart/related; boundary=\"r\"\r\n\r\n--r\r\nContent-Type: text/html; charset=utf-8\r\n\r\n<img src=\"cid:i@x\">\r\n--r\r\n"
    b"Content-Type: image/gif\r\nContent-ID: <i@x>\r\nContent-Transfer-Encoding: base64\r\n\r\nR0lGODlhAQABAAAAACw=\r\n--r--\r\n")
deep, end = b"", b""
for i in range(60):
    deep += b"Content-Type: multipart/mixed; boundary=\"b%d\"\r\n\r\n--b%d\r\n" % (i, i)
    end = b"\r\n--b%d--\r\n" % i + end
put("deep", b"Subject: deep\r\n" + MIME + deep + b"Content-Type: text/plain\r\n\r\nbottom" + end)
put("boundary-tricks", b"Subject: boundaries\r\n" + MIME + b"Content-Type: multipart/mixed;\r\n boundary=\"a'()+_,-./:=? b\"\r\n\r\npreamble\r\n--a'()+_,-./:=? b  \r\n\r\none\r\n--a'()+_,-./:=? bc\r\nno boundary\r\n--a'()+_,-./:=? b--\r\nepilogue\r\n")
put("unclosed", b"Subject: unclosed\r\n" + MIME + b"Content-Type: multipart/mixed; boundary=q\r\n\r\n--q\r\nContent-Type: text/plain\r\n\r\nnever closed\r\n")
put("attached-message", b"Subject: attached\r\n" + MIME + b"Content-Type: multipart/mixed; boundary=m\r\n\r\n--m\r\nContent-Type: message/rfc822\r\n\r\nFrom: x@y.example\r\nBcc: kept@y.example\r\nSubject: inner\r\n\r\ninner\r\n--m--\r\n")
put("attachment-names", b"Subject: names\r\n" + MIME + b"Content-Type: multipart/mixed; boundary=n\r\n\r\n--n\r\nContent-Type: application/octet-stream; name=\"=?utf-8?Q?=C3=BC.bin?=\"\r\n"
    b"Content-Disposition: attachment; filename*0*=utf-8''%C3%BC; filename*1=\".bin\"\r\nContent-Transfer-Encoding: base64\r\n\r\nAAEC\r\n--n--\r\n")
put("calendar", b"Subject: invitation\r\n" + MIME + b"Content-Type: multipart/alternative; boundary=c\r\n\r\n--c\r\nContent-Type: text/plain\r\n\r\nmeet\r\n--c\r\nContent-Type: text/calendar; method=REQUEST; charset=utf-8\r\n\r\n"
    b"BEGIN:VCALENDAR\r\nMETHOD:REQUEST\r\nEND:VCALENDAR\r\n--c--\r\n")
tnef = b"\x78\x9f\x3e\x22\x01\x00\x01\x06\x90\x08\x00\x04\x00\x00\x00\x00\x00\x01\x00\x01\x00\x01\x07\x90\x06\x00\x08\x00\x00\x00\xe4\x04\x00\x00\x00\x00\x00\x00\xe8\x00"
put("winmail", b"Subject: tnef\r\nX-MS-TNEF-Correlator: <winmail@corpus.example>\r\n" + MIME + b"Content-Type: multipart/mixed; boundary=t\r\n\r\n--t\r\n\r\nsee attachment\r\n--t\r\nContent-Type: application/ms-tnef; name=\"winmail.dat\"\r\n"
    b"Content-Disposition: attachment; filename=\"winmail.dat\"\r\nContent-Transfer-Encoding: base64\r\n\r\n" + base64.b64encode(tnef) + b"\r\n--t--\r\n")
put("bounce", b"Subject: report\r\nAuto-Submitted: auto-replied\r\n" + MIME + b"Content-Type: multipart/report; report-type=delivery-status; boundary=d\r\n\r\n--d\r\n\r\ntext\r\n--d\r\nContent-Type: message/delivery-status\r\n\r\nReporting-MTA: dns; x\r\n\r\nAction: failed\r\n--d--\r\n")
put("priority", b"Subject: now\r\nX-Priority: 1 (Highest)\r\nImportance: high\r\nPrecedence: bulk\r\nList-Unsubscribe: <mailto:u@corpus.example>\r\nIn-Reply-To: <a@b>\r\nReferences: <a@b>\r\nDisposition-Notification-To: dev@corpus.example\r\n\r\nx\r\n")

with tempfile.TemporaryDirectory() as tmp:
    key, cert = tmp + "/k.pem", tmp + "/c.pem"
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "36500", "-subj", "/CN=dev@corpus.example", "-keyout", key, "-out", cert)
    text = crlf(b"Content-Type: text/plain; charset=utf-8\n\nsigned text \nwith a line that ends in a space\n")
    signed = run("openssl", "cms", "-sign", "-signer", cert, "-inkey", key, "-md", "sha256", "-binary", "-outform", "SMIME", stdin=text)
    put("smime-signed", b"Subject: signed\r\n" + crlf(signed))
    opaque = run("openssl", "cms", "-sign", "-nodetach", "-signer", cert, "-inkey", key, "-outform", "SMIME", stdin=text)
    put("smime-opaque", b"Subject: signed\r\n" + crlf(opaque))
    sealed = run("openssl", "cms", "-encrypt", "-aes256", "-outform", "SMIME", cert, stdin=text)
    put("smime-encrypted", b"Subject: encrypted\r\n" + crlf(sealed))
    os.replace(cert, "smime-cert.pem")

    # DKIM (RFC 6376), simple/simple, by hand.
    body = b"body\r\nwith  spaces \r\n"
    bh = base64.b64encode(run("openssl", "dgst", "-sha256", "-binary", stdin=body))
    head = HEAD % b"dkim" + b"Subject: dkim\r\n"
    sig = b"DKIM-Signature: v=1; a=rsa-sha256; c=simple/simple; d=corpus.example; s=k;\r\n h=from:to:subject:date:message-id; bh=" + bh + b";\r\n b="
    fields = {l.split(b":")[0].lower(): l for l in head.split(b"\r\n")[:-1]}
    data = b"".join(fields[h] + b"\r\n" for h in (b"from", b"to", b"subject", b"date", b"message-id")) + sig
    b = base64.b64encode(run("openssl", "dgst", "-sha256", "-sign", key, "-binary", stdin=data))
    put("dkim", body, head=sig + b + b"\r\n" + head + b"\r\n")

    env = ["gpg", "--homedir", tmp, "--batch", "--passphrase", "", "--quiet"]
    run(*env, "--quick-gen-key", "dev@corpus.example", "default", "default", "never")
    part = crlf(b"Content-Type: text/plain\n\npgp signed\n- dash\n")
    asc = crlf(run(*env, "--armor", "--detach-sign", "--digest-algo", "SHA256", stdin=part))
    put("pgp-signed", b"Subject: pgp\r\n" + MIME + b"Content-Type: multipart/signed; micalg=pgp-sha256; protocol=\"application/pgp-signature\"; boundary=p\r\n\r\n--p\r\n" + part + b"\r\n--p\r\nContent-Type: application/pgp-signature\r\n\r\n" + asc + b"\r\n--p--\r\n")
    inline = crlf(run(*env, "--clearsign", stdin=b"inline\n- dash\n"))
    put("pgp-inline", b"Subject: pgp\r\n\r\n" + inline)
    sealed = crlf(run(*env, "--armor", "--encrypt", "--trust-model", "always", "-r", "dev@corpus.example", stdin=b"secret\n"))
    put("pgp-encrypted", b"Subject: pgp\r\n" + MIME + b"Content-Type: multipart/encrypted; protocol=\"application/pgp-encrypted\"; boundary=e\r\n\r\n--e\r\nContent-Type: application/pgp-encrypted\r\n\r\nVersion: 1\r\n--e\r\nContent-Type: application/octet-stream\r\n\r\n" + sealed + b"\r\n--e--\r\n")
    subprocess.run(["gpgconf", "--homedir", tmp, "--kill", "all"], check=False)
