// An S3 server that keeps objects in memory, fast enough that a client is what a benchmark measures.
//
// It knows GET, HEAD, PUT and DELETE of objects, with metadata, and HEAD and PUT of buckets, whose
// listings are always empty. It checks no signature. Beyond its limit it drops the oldest objects.
package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const headLimit = 64 << 10

const httpDate = "Mon, 02 Jan 2006 15:04:05 GMT"

func main() {
	address := flag.String("address", "127.0.0.1:0", "address to listen on")
	certificate := flag.String("cert", "", "certificate (PEM); with it the server speaks TLS")
	key := flag.String("key", "", "key of the certificate (PEM)")
	limit := flag.Int64("limit", 4<<30, "bytes of all objects beyond which the oldest are dropped")
	flag.Parse()
	listener, err := net.Listen("tcp", *address)
	if err != nil {
		log.Fatal(err)
	}
	if *certificate != "" {
		pair, err := tls.LoadX509KeyPair(*certificate, *key)
		if err != nil {
			log.Fatal(err)
		}
		listener = tls.NewListener(listener, &tls.Config{
			Certificates:                []tls.Certificate{pair},
			DynamicRecordSizingDisabled: true,
		})
	}
	fmt.Println(listener.Addr())
	objects := newStore(*limit)
	for {
		connection, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go serve(connection, objects)
	}
}

type request struct {
	method, path string
	query        string
	length       int
	close        bool
	metadata     []byte // the x-amz-meta-* lines, as received
}

var etags atomic.Uint64

var emptyListing = []byte(
	"<ListBucketResult><Name>any</Name><IsTruncated>false</IsTruncated></ListBucketResult>")

// serve answers the requests of one connection until it ends or one cannot be understood.
func serve(connection net.Conn, objects *store) {
	defer connection.Close()
	reader := bufio.NewReaderSize(connection, headLimit)
	for {
		request, err := readRequest(reader)
		if err != nil {
			if !errors.Is(err, io.EOF) {
				_ = send(connection, "400 Bad Request", "Connection: close\r\n", nil, 0)
			}
			return
		}
		if err := answer(connection, reader, request, objects); err != nil || request.close {
			return
		}
	}
}

func answer(connection net.Conn, body io.Reader, r request, objects *store) error {
	switch {
	case r.query != "" || strings.Count(strings.Trim(r.path, "/"), "/") == 0:
		if _, err := io.CopyN(io.Discard, body, int64(r.length)); err != nil {
			return err
		}
		if r.method == "GET" && strings.Contains(r.query, "list-type=2") {
			return send(connection, "200 OK", "Content-Type: application/xml\r\n", emptyListing, len(emptyListing))
		}
		if r.query != "" {
			return send(connection, "501 Not Implemented", "", nil, 0)
		}
		return send(connection, "200 OK", "", nil, 0)
	case r.method == "PUT":
		object := objects.allocate(r.length)
		if _, err := io.ReadFull(body, object.content); err != nil {
			return err
		}
		tag := etags.Add(1)
		object.head = fmt.Sprintf("ETag: \"%032x\"\r\nLast-Modified: %s\r\n%s",
			tag, time.Now().UTC().Format(httpDate), r.metadata)
		objects.put(r.path, object)
		return send(connection, "200 OK", fmt.Sprintf("ETag: \"%032x\"\r\n", tag), nil, 0)
	case r.method == "DELETE":
		objects.remove(r.path)
		return send(connection, "204 No Content", "", nil, -1)
	case r.method == "GET" || r.method == "HEAD":
		object := objects.get(r.path)
		if object == nil {
			missing := []byte("<Error><Code>NoSuchKey</Code></Error>")
			if r.method == "HEAD" {
				return send(connection, "404 Not Found", "", nil, len(missing))
			}
			return send(connection, "404 Not Found", "", missing, len(missing))
		}
		defer objects.release(object)
		content := object.content
		if r.method == "HEAD" {
			content = nil
		}
		return send(connection, "200 OK", object.head, content, len(object.content))
	}
	return send(connection, "405 Method Not Allowed", "Connection: close\r\n", nil, 0)
}

// send writes a response with one system call, if it can; a negative length is not declared.
func send(connection net.Conn, status, fields string, content []byte, length int) error {
	head := make([]byte, 0, 1024)
	head = append(head, "HTTP/1.1 "...)
	head = append(head, status...)
	head = append(head, "\r\nServer: memory-s3\r\nDate: "...)
	head = time.Now().UTC().AppendFormat(head, httpDate)
	head = append(head, "\r\n"...)
	if length >= 0 {
		head = append(head, "Content-Length: "...)
		head = strconv.AppendInt(head, int64(length), 10)
		head = append(head, "\r\n"...)
	}
	head = append(head, fields...)
	head = append(head, "\r\n"...)
	if len(content) == 0 {
		_, err := connection.Write(head)
		return err
	}
	buffers := net.Buffers{head, content}
	_, err := buffers.WriteTo(connection)
	return err
}

func readRequest(reader *bufio.Reader) (request, error) {
	var r request
	line, err := reader.ReadSlice('\n')
	if err != nil {
		return r, err
	}
	parts := strings.Fields(string(line))
	if len(parts) != 3 {
		return r, errors.New("malformed request line")
	}
	r.method = parts[0]
	r.path, r.query, _ = strings.Cut(parts[1], "?")
	for {
		line, err := reader.ReadSlice('\n')
		if err != nil {
			return r, err
		}
		if len(line) <= 2 {
			return r, nil
		}
		name, value, _ := bytes.Cut(line, []byte(":"))
		switch field := strings.ToLower(string(name)); {
		case field == "content-length":
			r.length, err = strconv.Atoi(string(bytes.TrimSpace(value)))
			if err != nil || r.length < 0 {
				return r, errors.New("malformed length")
			}
		case field == "connection":
			r.close = bytes.Contains(bytes.ToLower(value), []byte("close"))
		case strings.HasPrefix(field, "x-amz-meta-"):
			r.metadata = append(r.metadata, line...)
		}
	}
}
