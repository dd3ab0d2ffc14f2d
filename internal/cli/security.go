package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/pflag"

	"github.com/harvest-run/executord/client"
)

// KeyVar is the variable that may hold the API key itself. There is no flag for it: what
// stands in a command line, all users of the host can read.
const KeyVar = "EXECUTOR_API_KEY"

// keyFileFlag is the flag with the file of the API key.
const keyFileFlag = "api-key-file"

// maxKeyFile bounds the file of an API key or token, in bytes.
const maxKeyFile = 64 << 10

// security is how the server is checked and what it is shown.
type security struct {
	tls                   bool
	ca, cert, key, server string
	keyFile               string
}

func (s *security) bind(flags *pflag.FlagSet) {
	flags.BoolVar(&s.tls, "tls", false, "encrypt the connection; the other --tls flags do so too")
	flags.StringVar(&s.ca, "tls-ca", "", "PEM file with the authorities of the server's certificate (default those of the system)")
	flags.StringVar(&s.cert, "tls-cert", "", "PEM file with a certificate to show to the server")
	flags.StringVar(&s.key, "tls-key", "", "PEM file with the certificate's key")
	flags.StringVar(&s.server, "tls-server-name", "", "name in the server's certificate (default the host in the address)")
	flags.StringVar(&s.keyFile, keyFileFlag, "", "file with an API key or bearer token; it is read for each call")
}

// apply sets what a client needs. key is that of the environment; a file that was given
// as a flag counts before it.
func (s *security) apply(cfg *client.Config, fileGiven bool, key string) error {
	if s.tls || s.ca != "" || s.cert != "" || s.key != "" || s.server != "" {
		cfg.TLS = &client.TLS{CAFile: s.ca, CertFile: s.cert, KeyFile: s.key, ServerName: s.server}
	}
	switch {
	case key != "" && !fileGiven:
		cfg.APIKey = key
	case s.keyFile != "":
		if _, err := readKey(s.keyFile); err != nil {
			return usagef("%s", err)
		}
		cfg.Token = func(context.Context) (string, error) { return readKey(s.keyFile) }
	}
	return nil
}

// readKey reads an API key or token, without the space around it.
func readKey(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("read the API key: %w", err)
	}
	defer file.Close()
	content, err := readKeyed(file)
	if err != nil {
		return "", fmt.Errorf("read the API key: %q: %w", path, err)
	}
	key := strings.TrimSpace(string(content))
	if key == "" {
		return "", fmt.Errorf("read the API key: there is none in %q", path)
	}
	return key, nil
}

// readKeyed reads what holds a key, which is short.
func readKeyed(r io.Reader) ([]byte, error) {
	content, err := io.ReadAll(io.LimitReader(r, maxKeyFile+1))
	if err == nil && len(content) > maxKeyFile {
		err = fmt.Errorf("it is longer than %d bytes", maxKeyFile)
	}
	return content, err
}
