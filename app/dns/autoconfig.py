"""What Thunderbird asks for when somebody sets up an account: https://www.bucksch.org/1/projects/thunderbird/autoconfiguration/"""

from xml.etree.ElementTree import Element, SubElement, indent, tostring

from app.dns.records import Ports


def autoconfig(domain: str, name: str, ports: Ports) -> bytes:
    """XML, the preferred first: IMAP and submission with TLS from the first octet on (RFC 8314)."""
    root = Element("clientConfig", version="1.1")
    provider = SubElement(root, "emailProvider", id=domain)
    for tag, text in (("domain", domain), ("displayName", domain), ("displayShortName", domain)):
        SubElement(provider, tag).text = text
    offered = [
        ("incomingServer", "imap", ports.imaps, "SSL"),
        ("incomingServer", "imap", ports.imap, "STARTTLS"),
        ("incomingServer", "pop3", ports.pop3s, "SSL"),
        ("outgoingServer", "smtp", ports.submissions, "SSL"),
        ("outgoingServer", "smtp", ports.submission, "STARTTLS"),
    ]
    for tag, kind, port, security in offered:
        if port is None:
            continue
        server = SubElement(provider, tag, type=kind)
        for member, text in (
            ("hostname", name),
            ("port", str(port)),
            ("socketType", security),
            ("authentication", "password-cleartext"),
            ("username", "%EMAILADDRESS%"),
        ):
            SubElement(server, member).text = text
    indent(root)
    xml: bytes = tostring(root, encoding="utf-8", xml_declaration=True)
    return xml + b"\n"
