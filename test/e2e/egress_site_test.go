package e2e

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// internet is what sandboxes reach in these tests: a DNS server that knows names below
// .test, and a web server with TLS and one without that answer for all of them.
type internet struct {
	nameserver string
	secure     string // port of the one with TLS
	plain      string
	ca         string // PEM
}

const bigBytes = 1 << 30

func startInternet(t *testing.T) *internet {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("/hello", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "hello from %s\n", r.Host) })
	mux.HandleFunc("/big", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(bigBytes))
		block := make([]byte, 1<<20)
		for range bigBytes / len(block) {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	})
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		for i := range 50 {
			fmt.Fprintf(w, "tick %d\n", i)
			_ = http.NewResponseController(w).Flush()
			select {
			case <-time.After(200 * time.Millisecond):
			case <-r.Context().Done():
				return
			}
		}
	})
	servePip(mux)
	serveNPM(mux)
	serveGit(t, mux)
	site := &internet{nameserver: startNameserver(t)}
	plain := httptest.NewServer(mux)
	t.Cleanup(plain.Close)
	secure := httptest.NewUnstartedServer(mux)
	var certificate tls.Certificate
	certificate, site.ca = newCertificate(t, "web.test")
	secure.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	secure.StartTLS()
	t.Cleanup(secure.Close)
	_, site.plain, _ = net.SplitHostPort(plain.Listener.Addr().String())
	_, site.secure, _ = net.SplitHostPort(secure.Listener.Addr().String())
	return site
}

// startNameserver answers for names below .test: private.test is 10.11.12.13,
// metadata.test 169.254.169.254, six.test is ::1, all others are 127.0.0.1.
func startNameserver(t *testing.T) string {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		packet := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(packet)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(packet[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			m.Response, m.Authoritative, m.Additionals = true, true, nil
			question := m.Questions[0]
			name := strings.TrimSuffix(question.Name.String(), ".")
			address := map[string]string{"private.test": "10.11.12.13", "metadata.test": "169.254.169.254", "six.test": "::1"}[name]
			if address == "" {
				address = "127.0.0.1"
			}
			header := dnsmessage.ResourceHeader{Name: question.Name, Class: dnsmessage.ClassINET, TTL: 1}
			ip := net.ParseIP(address)
			switch four := ip.To4(); {
			case !strings.HasSuffix(name, ".test"):
				m.RCode = dnsmessage.RCodeNameError
			case question.Type == dnsmessage.TypeA && four != nil:
				header.Type = dnsmessage.TypeA
				m.Answers = []dnsmessage.Resource{{Header: header, Body: &dnsmessage.AResource{A: [4]byte(four)}}}
			case question.Type == dnsmessage.TypeAAAA && four == nil:
				header.Type = dnsmessage.TypeAAAA
				m.Answers = []dnsmessage.Resource{{Header: header, Body: &dnsmessage.AAAAResource{AAAA: [16]byte(ip.To16())}}}
			}
			if answer, err := m.Pack(); err == nil {
				_, _ = conn.WriteTo(answer, from)
			}
		}
	}()
	return conn.LocalAddr().String()
}

// newCertificate makes an authority and a certificate of it. Node takes no certificate
// that is its own authority.
func newCertificate(t *testing.T, names ...string) (tls.Certificate, string) {
	t.Helper()
	sign := func(template, parent *x509.Certificate, by *ecdsa.PrivateKey) ([]byte, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if by == nil {
			parent, by = template, key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, by)
		if err != nil {
			t.Fatal(err)
		}
		return der, key
	}
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority of the tests"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
	}
	ca, caKey := sign(authority, nil, nil)
	der, key := sign(&x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: names[0]}, DNSNames: names,
		NotBefore: authority.NotBefore, NotAfter: authority.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, authority, caKey)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca}))
}

// servePip is a simple index with one package.
func servePip(mux *http.ServeMux) {
	const dir = "hello_pkg-1.0.dist-info/"
	var wheel bytes.Buffer
	z := zip.NewWriter(&wheel)
	for _, file := range []struct{ name, text string }{
		{"hello_pkg.py", "def hello():\n    return 'hello from pip'\n"},
		{dir + "METADATA", "Metadata-Version: 2.1\nName: hello-pkg\nVersion: 1.0\n"},
		{dir + "WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"},
		{dir + "RECORD", "hello_pkg.py,,\n" + dir + "METADATA,,\n" + dir + "WHEEL,,\n" + dir + "RECORD,,\n"},
	} {
		w, _ := z.Create(file.name)
		_, _ = io.WriteString(w, file.text)
	}
	_ = z.Close()
	const file = "hello_pkg-1.0-py3-none-any.whl"
	sum := sha256.Sum256(wheel.Bytes())
	mux.HandleFunc("/simple/hello-pkg/", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprintf(w, `<!DOCTYPE html><html><body><a href="/files/%s#sha256=%s">%s</a></body></html>`, file, hex.EncodeToString(sum[:]), file)
	})
	mux.HandleFunc("/files/"+file, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(wheel.Bytes()) })
}

// serveNPM is a registry with one package.
func serveNPM(mux *http.ServeMux) {
	var archive bytes.Buffer
	gz := gzip.NewWriter(&archive)
	tw := tar.NewWriter(gz)
	for _, file := range []struct{ name, text string }{
		{"package/package.json", `{"name":"hello-pkg","version":"1.0.0","main":"index.js"}`},
		{"package/index.js", "module.exports = () => 'hello from npm'\n"},
	} {
		_ = tw.WriteHeader(&tar.Header{Name: file.name, Mode: 0o644, Size: int64(len(file.text))})
		_, _ = io.WriteString(tw, file.text)
	}
	_, _ = tw.Close(), gz.Close()
	sum := sha1.Sum(archive.Bytes())
	mux.HandleFunc("/npm/hello-pkg", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"name":"hello-pkg","dist-tags":{"latest":"1.0.0"},"versions":{"1.0.0":{"name":"hello-pkg","version":"1.0.0","dist":{"shasum":"%s","tarball":"https://%s/npm/hello-pkg.tgz"}}}}`,
			hex.EncodeToString(sum[:]), r.Host)
	})
	mux.HandleFunc("/npm/hello-pkg.tgz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(archive.Bytes()) })
}

// serveGit is git's own server with one repository.
func serveGit(t *testing.T, mux *http.ServeMux) {
	t.Helper()
	dir := t.TempDir()
	script := `set -e; git init -q -b main work; cd work; echo "hello from git" > README
git -c user.name=t -c user.email=t@example.com add README; git -c user.name=t -c user.email=t@example.com commit -q -m first
cd ..; git clone -q --bare work hello.git; git -C hello.git config http.receivepack true`
	cmd := exec.Command("bash", "-c", script)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "HOME="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	mux.Handle("/git/", &cgi.Handler{
		Path: "/usr/lib/git-core/git-http-backend", Root: "/git",
		Env: []string{"GIT_PROJECT_ROOT=" + filepath.Clean(dir), "GIT_HTTP_EXPORT_ALL=1", "HOME=" + dir},
	})
}
